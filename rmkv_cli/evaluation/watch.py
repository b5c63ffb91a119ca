"""Observation of a model's memory while it reads: gates, attention and rank, recorded by hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.model import RMKV, AssociativeStore, AttentionPooling, RecurrentMemoryCell, RMKVBlock, State
from rmkv_cli.model.adapters import LoRACell
from rmkv_cli.model.cells import MinimalRNNCell, matrices


class Watched:
    """Records of the first row while a model reads; all are sums over its whole segments.

    There are L layers, m slots, G heads of keys and values, and U kinds of tokens, which the caller of `read` numbers.
    """

    def __init__(self, model: RMKV, kinds: int) -> None:
        config, device = model.config, model.memory.device
        L, m, D = len(model.blocks), config.memory.slots, config.hidden_size
        self.segments = 0
        self.log_keep = torch.zeros(L, m, D, dtype=torch.float64, device=device)
        """Log of the keep gate (L, m, D)."""
        self.on_memory = torch.zeros(L, m, device=device)
        """Share of a slot's attention that goes to slots (L, m)."""
        self.attended = torch.zeros(L, m, kinds, device=device)
        """Share of a slot's attention that goes to a kind of token (L, m, U)."""
        self.pooled = torch.zeros(L, m, kinds, device=device)
        """Share of the attention in a slot's pooling that goes to a kind of token (L, m, U)."""
        self.counts = torch.zeros(kinds, device=device)
        """Number of tokens of each kind (U,)."""
        self.slot_ranks = torch.zeros(L, dtype=torch.float64, device=device)
        """Effective rank of the slots at a segment's end (L,)."""
        self.store_ranks = torch.zeros(config.stores, config.key_value_heads, dtype=torch.float64, device=device)
        """Effective rank of the store (layers with a store, G)."""
        self.log_left = torch.zeros_like(self.store_ranks)
        """Log of the share of the store that writing leaves, averaged over all directions (layers with a store, G)."""
        self._written = torch.zeros_like(self.log_left)
        self._segment = torch.zeros(0, dtype=torch.int64, device=device)
        self._last: tuple[Tensor, ...] = ()

    def read(self, segment: Tensor) -> None:
        """Set the kinds of the tokens (T,) that are read next."""
        self._segment = segment

    def close(self, state: State) -> None:
        """Record the state at the end of a whole segment."""
        self.segments += 1
        self.counts.index_add_(0, self._segment, torch.ones_like(self._segment, dtype=torch.float32))
        if state.memory.shape[2]:
            self.slot_ranks += effective_rank(state.memory[:, 0])
        if state.store is not None:
            self.store_ranks += effective_rank(state.store[:, 0])
            self.log_left += self._written

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
        """Keep the inputs of attention, whose first queries are the slots'."""
        m = self.on_memory.shape[1]
        k = k[0].repeat_interleave(q.shape[1] // k.shape[1], dim=0)
        self._last = q[0, :, :m], k, mask[0, :, :m]

    def pooling(self, layer: int, pooling: AttentionPooling, x: Tensor, mask: Tensor) -> None:
        """Record the attention of the slots, and that of the pooling over x (B, S, D) with a mask (B, 1, S)."""
        q, k, seen = self._last
        weights = attention_weights(q, k, seen).mean(0)
        on_tokens = weights[:, weights.shape[1] - x.shape[1] :]
        self.on_memory[layer] += 1 - on_tokens.sum(-1)
        self.attended[layer].index_add_(1, self._segment, on_tokens)
        self.pooled[layer].index_add_(1, self._segment, attention_weights(pooling.queries, x[0], mask[0]))

    def cell(self, layer: int, cell: RecurrentMemoryCell, x: Tensor, hidden: Tensor) -> None:
        """Record the keep gate for a cell's input and hidden state (B, m, D)."""
        self.log_keep[layer] += F.logsigmoid(keep_gate(cell, x[0], hidden[0]).double())

    def store(self, layer: int, store: AssociativeStore, gates: Tensor) -> None:
        """Record a segment's write gates before the sigmoid: the first G of gates (B, S, G + H)."""
        write = gates[0, :, : store.heads[1]].double()
        self._written[layer] = F.logsigmoid(-write).sum(0) / store.start.shape[-2]


@contextmanager
def watch(model: RMKV, kinds: int) -> Iterator[Watched]:
    """Observe the stores of all layers, and the slots that are updated, inside the context."""
    watched = Watched(model, kinds)
    hooks = [hook for i, block in enumerate(model.blocks) for hook in _hooks(i, block, watched)]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(layer: int, block: nn.Module, watched: Watched) -> Iterator[Any]:
    assert isinstance(block, RMKVBlock)
    if (store := block.store) is not None:
        yield store.gates.register_forward_hook(lambda _, given, gates: watched.store(layer, store, gates))
    if block.pooling is None or block.cell is None:
        return
    yield block.attention.register_forward_pre_hook(lambda _, given: watched.attention(*given))
    yield block.pooling.register_forward_pre_hook(lambda pooling, given: watched.pooling(layer, pooling, *given))
    yield block.cell.register_forward_pre_hook(lambda cell, given: watched.cell(layer, cell, *given[:2]))


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + mask), (..., T, K), for q (..., T, d) and k (..., K, d)."""
    scores = (q.to(k.dtype) @ k.mT).float() * q.shape[-1] ** -0.5
    return (scores + mask.float()).softmax(-1)


def keep_gate(cell: RecurrentMemoryCell, x: Tensor, hidden: Tensor) -> Tensor:
    """Return a memory cell's keep gate before the sigmoid, (m, D), for its input and hidden state (m, D)."""
    inner = cell.cell
    weight = next(inner.parameters())
    x, hidden = x.to(weight.dtype), hidden.to(weight.dtype)
    if not isinstance(inner, MinimalRNNCell):  # in GRU and LSTM it is the second gate of torch's weights
        of_x, of_h = inner.merged_weights().values() if isinstance(inner, LoRACell) else matrices(inner)
        second = slice(hidden.shape[1], 2 * hidden.shape[1])
        given = F.linear(x, of_x[second], inner.bias_ih[second])
        return given + F.linear(hidden, of_h[second], inner.bias_hh[second])
    return inner.linear(torch.cat([hidden, x], dim=-1)).chunk(2, dim=-1)[0]


def effective_rank(matrix: Tensor) -> Tensor:
    """Return exp(H(p)) of matrices (..., m, n), where p are the normalized singular values (Roy & Vetterli, 2007).

    It is 1 if all rows are parallel, m if they are orthogonal and equally long, and 0 for a matrix of zeros.
    """
    values = torch.linalg.svdvals(matrix.double())
    total = values.sum(-1, keepdim=True)
    rank = torch.special.entr(values / total).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, 0.0)
