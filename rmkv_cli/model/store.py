"""The associative store: bindings of keys to values, one matrix a head, written by the delta rule."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.precision import wide
from rmkv_cli.model.view import CHUNK, TAPS, View


class AssociativeStore(nn.Module):
    """A matrix W (d, d) per head that holds values under keys: k W ≈ v for the keys and values of earlier tokens.

    A token's value is written under the key of the previous token, so a query retrieves what followed similar tokens.
    (With `store_key = "own"` it is written under the token's own key, which in a pretrained transformer contains the
    previous token.) Values, queries and keys are those of attention, without positions. Queries and keys go through a
    matrix per head, if configured, and through a short convolution, so that a key can reflect the tokens before it.
    Query heads that share keys and values share a W. The store's own parameters are the matrices, the convolution,
    gates per head, a norm, and the learned initial W of a document, which holds common successors. The gates see a
    token and its attention output: whether a digit is worth writing depends on its context. The store computes in
    float32 at least, because it writes differences.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, G, d = config.num_attention_heads, config.key_value_heads, config.head_width
        self.heads, self.own_key = (H, G), config.memory.store_key == "own"
        self.gates = nn.Linear(config.hidden_size + H * d, G + H)
        self.norm = nn.RMSNorm((H, d) if config.memory.store_maps else d, eps=1e-6)  # over d alone, see its use
        self.maps = nn.Parameter(torch.eye(d).repeat(H + G, 1, 1)) if config.memory.store_maps else None
        nn.init.zeros_(self.gates.bias)
        self.taps = nn.Parameter(torch.zeros(TAPS, H + G, 1, d))
        nn.init.ones_(self.taps[0])
        self.start = nn.Parameter(0.02 * torch.randn(G, d, d))

    def forward(
        self, store: Tensor, recent: Tensor, qk: Tensor, v: Tensor, gates: Tensor, view: View
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write and read T tokens; return each token's retrieved value, the new W and the new `recent`.

        The retrieved values (B, T, H * d) have the heads concatenated; W belongs to the last token's document.

        Args:
            store: W (B, G, d, d).
            recent: (B, H + G, 4, d), queries and keys of the last four tokens, the latest first.
            qk: (B, T, H + G, d), queries and keys without positions.
            v: (B, T, G, d).
            gates: (B, T, G + H), before the sigmoid: how strongly each token writes, b, and reads.
            view: whose documents the tokens are.
        """
        convolved, recent = self.convolve(qk, recent, view)
        found, store = self.write_and_read(store, convolved, v, gates, view)
        return found.to(qk.dtype), store, recent

    def convolve(self, qk: Tensor, recent: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return queries and write keys, (B, T, H + G, d), and the new `recent`.

        Each channel is a learned weighted sum over four consecutive tokens. Tokens of other documents count as zeros.
        With keys of the previous token, a document's first token is therefore not written.
        """
        tokens = torch.cat([recent.permute(0, 2, 1, 3).flip(1) * view.recent, qk], dim=1)
        recent = tokens[:, -TAPS:].flip(1).permute(0, 2, 1, 3)
        # Queries cover a token and the three before it; keys cover the same, or the four before it: (5, H + G, d).
        of_queries, of_keys = wide(self.taps).squeeze(2).flip(0).split_with_sizes(self.heads, dim=1)
        this, before = (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1)
        taps = torch.cat([F.pad(of_queries, this), F.pad(of_keys, this if self.own_key else before)], dim=1)
        tokens = wide(tokens)
        if self.maps is not None:
            tokens = torch.einsum("bthd,hde->bthe", tokens, wide(self.maps))
        if qk.shape[1] == 1:
            return (tokens * taps).sum(1, keepdim=True), recent
        return _Convolution.apply(tokens, taps, view.near), recent

    def write_and_read(self, store: Tensor, qk: Tensor, v: Tensor, gates: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Return what T tokens find, heads side by side (B, T, D), and W'.

        For each token in turn W <- W + b k^T (v - k W), the delta rule, and then it finds RMSNorm(q W) times its read
        strength. Within a chunk all errors v - k W follow at once from the W that it begins with, by one triangular
        system (Yang et al., 2024, "Parallelizing linear transformers with the delta rule"). Nothing fades by itself:
        only what is written under a like key takes something away.

        Args:
            store: W (B, G, d, d).
            qk: (B, T, H + G, d), which are normalized: only their direction counts.
            v: (B, T, G, d).
            gates: (B, T, G + H), before their sigmoid.
            view: whose documents the tokens are.
        """
        (B, T, _, d), (H, G) = qk.shape, self.heads
        C, R = min(T, CHUNK), H // G
        qkv = torch.cat([F.normalize(qk, dim=-1, eps=1e-6), wide(v)], dim=2)
        strengths = torch.sigmoid(wide(gates))[..., None]
        if fill := -T % C:  # tokens without a key write nothing
            qkv, strengths = (F.pad(x, (0, 0, 0, 0, 0, fill)) for x in (qkv, strengths))
        q, k, v = (_by_head(x, G, C) for x in qkv.split_with_sizes([H, G, G], dim=2))
        write, read = (_by_head(x, G, C) for x in strengths.split_with_sizes([G, H], dim=2))
        start = wide(self.start)
        W = (store if view.wrote_store is None else torch.where(view.wrote_store, store, start)).flatten(0, 1)
        error, weighted = write * v, write * k
        last, seen = k, weighted
        if view.mixed:  # tokens of a document that began after the chunk did see the learned start
            start = start.expand(B, -1, -1, -1).flatten(0, 1)
            error = error - view.later * (weighted @ start)
            seen, last = weighted * (1 - view.later), k * view.of_last
        if C > 1:
            system, both = (weighted @ k.mT) * view.earlier, torch.cat([error, seen], dim=-1)
            error, seen = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split_with_sizes(
                [d, d], dim=-1
            )
        before, errors = [], []
        for i, chunk in enumerate(zip(error.unbind(), seen.unbind(), last.unbind(), strict=True)):
            before.append(W)
            errors.append(torch.baddbmm(chunk[0], chunk[1], W, alpha=-1))
            base = torch.where(view.goes_on[i], W, start) if view.mixed else W
            W = torch.baddbmm(base, chunk[2].mT, errors[i])
        if C > 1:
            until, later = view.until, view.later
            if R > 1:
                until, later = (x.repeat_interleave(R, dim=-2) if isinstance(x, Tensor) else x for x in (until, later))
            found = q @ torch.stack(before)
            if view.mixed:
                found = torch.lerp(found, q @ start, later)
            found = found + ((q @ k.mT) * until) @ torch.stack(errors)
        else:  # a token finds what it writes itself
            found = q @ W
        found = F.rms_norm(found, (d,), eps=self.norm.eps) * read
        found = found.view(-1, B, G, C, R, d).permute(1, 0, 3, 2, 4, 5).reshape(B, -1, H, d) * wide(self.norm.weight)
        if fill:
            found = found[:, :T]
        return found.flatten(2), W.unflatten(0, (B, G))


def _by_head(x: Tensor, heads: int, C: int) -> Tensor:
    """Return x (B, N * C, heads * R, d) as (N, B * heads, C * R, d), where each token of a chunk has R queries."""
    B, T, rows, d = x.shape
    parts = x.view(B, T // C, C, heads, rows // heads, d).permute(1, 0, 3, 2, 4, 5)
    return parts.reshape(T // C, B * heads, C * rows // heads, d)


class _Convolution(torch.autograd.Function):
    """y_t = sum over i of taps_i x_(t + i) near_it, by hand, because PyTorch's gradient of a slice is as large as x.

    x (B, 4 + T, ...), taps (5, ...), near (5, B, T, ...) or None, y (B, T, ...).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, near: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps, near)
        y = x.new_zeros(())
        for i, tap in enumerate(taps):
            part = x[:, i : x.shape[1] - TAPS + i]
            y = torch.addcmul(y, part if near is None else part * near[i], tap)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,), (x, taps, near) = gradients, ctx.saved_tensors
        dx, dtaps = torch.zeros_like(x), []
        for i, tap in enumerate(taps):
            here, part = dy if near is None else dy * near[i], slice(i, x.shape[1] - TAPS + i)
            dx[:, part].addcmul_(here, tap)
            dtaps.append((here * x[:, part]).sum((0, 1)))
        return dx, torch.stack(dtaps), None
