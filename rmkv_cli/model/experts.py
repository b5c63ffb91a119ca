"""Experts: feed-forwards that each process only the tokens that a router sends them."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.feed_forward import FeedForward
from rmkv_cli.model.precision import widen

BLOCK = 32  # rows of a product
LOAD_GRADIENT = 1e-9  # of the balance per excess token: nothing in the gradients' norm, and AdamW divides it out
NAMESPACE = re.sub(r"\W", "_", __name__)
"""The namespace of the operations. Exported models contain copies of this module; registering a name twice would free
an operation that the other copy still calls."""


class Experts(nn.Module):
    """y = sum over a token's k experts e of s_e FeedForward_e(n), where s = sigmoid(R n) for the router's matrix R.

    A token's experts are those with the highest s_e + b_e. The balance b affects only this choice, and it is not
    trained by the loss: its gradient is each expert's excess of tokens, so that overloaded experts become less likely
    (Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"). No token is dropped.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, E = config.hidden_size, config.experts
        self.per_token, self.dropout = config.experts_per_token, nn.Dropout(config.dropout)
        self.router = nn.Linear(D, E, bias=False)
        self.balance = nn.Parameter(torch.zeros(E))
        self.feed_forwards = nn.ModuleList(FeedForward(D, config.expert_width, config.dropout) for _ in range(E))

    def forward(self, n: Tensor) -> Tensor:
        """Return the experts' weighted sum, (B, T, D), for normalized tokens n, (B, T, D)."""
        (B, T, D), k = n.shape, self.per_token
        # In order of time: an expert's earlier tokens then keep their rows, and thus every bit, whatever follows them.
        tokens = n.transpose(0, 1).reshape(T * B, D)
        weights, chosen = self._route(tokens)
        size = min(BLOCK, T * B)
        place, ends = _arrange(chosen.flatten(), len(self.feed_forwards), size)
        blocks = min(chosen.numel(), chosen.numel() // size + len(self.feed_forwards))
        rows = tokens.new_zeros(blocks * size, D).index_copy(0, place, tokens.repeat_interleave(k, 0))
        gate, up, down = (
            [layer.get_parameter(f"{x}.weight") for layer in self.feed_forwards] for x in FeedForward.PARTS
        )
        hidden = F.silu(grouped_product(rows, gate, ends, size)) * grouped_product(rows, up, ends, size)
        found = grouped_product(hidden, down, ends, size)[place].view(T * B, k, D)
        y = (found * weights[..., None].to(found.dtype)).sum(1)
        return self.dropout(y).view(T, B, D).transpose(0, 1)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and the indices of each token's experts, (N, k) each, for tokens (N, D)."""
        scores = torch.sigmoid(F.linear(widen(tokens), widen(self.router.weight)))
        chosen = (scores + self.balance).topk(self.per_token).indices
        weights = scores.gather(1, chosen)
        if self.training:
            load = F.one_hot(chosen.flatten(), scores.shape[1]).sum(0).to(scores.dtype)
            weights = _WithLoad.apply(weights, self.balance, LOAD_GRADIENT * (load - load.mean()))
        return weights, chosen


class _WithLoad(torch.autograd.Function):
    """Return the weights; the balance's gradient is `excess`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, balance: Tensor, excess: Tensor) -> Tensor:
        ctx.save_for_backward(excess)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.saved_tensors[0], None


def _arrange(experts: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return each assignment's row, (N,), and the end of each expert's blocks, (count,), for the assignments' experts.

    Rows are sorted by expert. Each expert has whole blocks of `size` rows; the last rows of its last block are unused.
    """
    assigned = F.one_hot(experts, count)
    blocks = (assigned.sum(0) + size - 1) // size
    ends = blocks.cumsum(0)
    rank = assigned.cumsum(0).gather(1, experts[:, None])[:, 0] - 1
    return (ends - blocks)[experts] * size + rank, ends


@torch.library.custom_op(f"{NAMESPACE}::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weights: list[Tensor], ends: Tensor, size: int) -> Tensor:
    """Return each row's product with the transposed matrix of its expert, (P, out).

    One operation for the compiler, because the groups' sizes depend on the data. On a CPU every product has the same
    shape, so that a row's bits do not depend on the number of rows in its group.

    Args:
        rows: the rows, (P, in).
        weights: the experts' matrices, (out, in) each.
        ends: the end of each expert's blocks, (experts,). Rows after the last end have no meaning.
        size: rows per block.
    """
    if rows.device.type == "cuda":
        return F.grouped_mm(rows, torch.stack(weights).mT, offs=(ends * size).int())
    y = rows.new_zeros(len(rows), len(weights[0]))
    block = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        for start in range(block * size, end * size, size):
            torch.mm(rows[start : start + size], weight.T, out=y[start : start + size])
        block = end
    return y


@grouped_product.register_fake
def _(rows: Tensor, weights: list[Tensor], ends: Tensor, size: int) -> Tensor:
    return rows.new_empty(len(rows), len(weights[0]))


@torch.library.custom_op(f"{NAMESPACE}::grouped_product_backward", mutates_args=())
def _grouped_product_backward(
    dy: Tensor, rows: Tensor, weights: list[Tensor], ends: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows, (P, in), and of weights, (experts, out, in)."""
    if rows.device.type == "cuda":
        offsets = (ends * size).int()
        return F.grouped_mm(dy, torch.stack(weights), offs=offsets), F.grouped_mm(dy.mT, rows, offs=offsets)
    dx, dw = torch.zeros_like(rows), rows.new_zeros(len(weights), *weights[0].shape)
    start = 0
    for i, end in enumerate((ends * size).tolist()):
        torch.mm(dy[start:end], weights[i], out=dx[start:end])
        torch.mm(dy[start:end].T, rows[start:end], out=dw[i])
        start = end
    return dx, dw


@_grouped_product_backward.register_fake
def _(dy: Tensor, rows: Tensor, weights: list[Tensor], ends: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty(len(weights), *weights[0].shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ends, ctx.size = inputs
    ctx.save_for_backward(rows, ends, *weights)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, list[Tensor], None, None]:
    rows, ends, *weights = ctx.saved_tensors
    dx, dw = _grouped_product_backward(dy.contiguous(), rows, weights, ends, ctx.size)
    return dx, list(dw.unbind()), None, None


grouped_product.register_autograd(_differentiate, setup_context=_save)
