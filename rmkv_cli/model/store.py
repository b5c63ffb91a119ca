"""The associative store: one matrix per head that binds keys to values, written by the delta rule."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.context import CHUNK, TAPS, SegmentContext
from rmkv_cli.model.precision import widen


class AssociativeStore(nn.Module):
    """A matrix W (p, d) per head that holds values under keys: k W ≈ v for the keys and values of earlier tokens.

    A token's value is written under the key of the previous token, so a query retrieves what followed similar tokens.
    (With `store_key = "own"` it is written under the token's own key, which in a pretrained transformer contains the
    previous token.) Values, queries and keys are those of attention, without positions. Queries and keys pass through
    a matrix per head, if configured, and through a short convolution, so a key can reflect the tokens before it. W
    sees their p features (`dpfp`), or their d channels if `store_features` is 0. Query heads that share keys and values
    share a W.

    The store's own parameters are these matrices, the convolution's taps, gates per head, a norm, and the initial W of
    a document, which learns common successors. The gates read a token and its attention output, because context
    decides whether a token is worth writing. The store computes in float32 at least, because it writes differences.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, G, d = config.num_attention_heads, config.key_value_heads, config.head_width
        self.heads, self.own_key = (H, G), config.memory.store_key == "own"
        self.features = config.memory.store_features
        self.gates = nn.Linear(config.hidden_size + H * d, G + H)
        # Only the weight can have a dimension for heads; `write_and_read` normalizes over d alone.
        self.norm = nn.RMSNorm((H, d) if config.memory.store_maps else d, eps=1e-6)
        self.maps = nn.Parameter(torch.eye(d).repeat(H + G, 1, 1)) if config.memory.store_maps else None
        nn.init.zeros_(self.gates.bias)
        self.taps = nn.Parameter(torch.zeros(TAPS, H + G, 1, d))
        nn.init.ones_(self.taps[0])
        self.start = nn.Parameter(0.02 * torch.randn(G, config.store_key_width, d))

    def forward(
        self, store: Tensor, recent: Tensor, qk: Tensor, v: Tensor, gates: Tensor, context: SegmentContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write and read T tokens; return each token's retrieved value, the new W and the new `recent`.

        The retrieved values have the heads concatenated, (B, T, H * d). W belongs to the last token's document.

        Args:
            store: W, (B, G, p, d).
            recent: queries and keys of the last four tokens, the latest first, (B, H + G, 4, d).
            qk: queries and keys without positions, (B, T, H + G, d).
            v: values, (B, T, G, d).
            gates: strengths of writing, b, and of reading, before the sigmoid, (B, T, G + H).
            context: masks of the call.
        """
        convolved, recent = self.convolve(qk, recent, context)
        retrieved, store = self.write_and_read(store, convolved, v, gates, context)
        return retrieved.to(qk.dtype), store, recent

    def convolve(self, qk: Tensor, recent: Tensor, context: SegmentContext) -> tuple[Tensor, Tensor]:
        """Return queries and write keys, (B, T, H + G, d), and the new `recent`.

        Each channel is a learned weighted sum over four consecutive tokens. Tokens of other documents count as zeros.
        If keys are those of the previous token, a document's first token is therefore not written.
        """
        tokens = torch.cat([recent.permute(0, 2, 1, 3).flip(1) * context.recent_mask, qk], dim=1)
        recent = tokens[:, -TAPS:].flip(1).permute(0, 2, 1, 3)
        # Queries cover a token and the three before it; keys cover the same, or the four before it: (5, H + G, d).
        query_taps, key_taps = widen(self.taps).squeeze(2).flip(0).split_with_sizes(self.heads, dim=1)
        current, previous = (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1)
        taps = torch.cat([F.pad(query_taps, current), F.pad(key_taps, current if self.own_key else previous)], dim=1)
        tokens = widen(tokens)
        if self.maps is not None:
            tokens = torch.einsum("bthd,hde->bthe", tokens, widen(self.maps))
        if qk.shape[1] == 1:
            return (tokens * taps).sum(1, keepdim=True), recent
        return _Convolution.apply(tokens, taps, context.convolution_mask), recent

    def write_and_read(
        self, store: Tensor, qk: Tensor, v: Tensor, gates: Tensor, context: SegmentContext
    ) -> tuple[Tensor, Tensor]:
        """Return the values that T tokens retrieve, (B, T, H * d), and the new W, (B, G, p, d).

        Each token in turn writes W <- W + b k^T (v - k W), the delta rule, and then reads RMSNorm(q W) times its read
        strength. Within a chunk, one triangular system gives all errors v - k W from the chunk's initial W (Yang et
        al., 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"). Bindings do not decay:
        only a write under a similar key overwrites them.

        Args:
            store: W, (B, G, p, d).
            qk: queries and keys, (B, T, H + G, d), normalized here because only their direction counts.
            v: values, (B, T, G, d).
            gates: strengths of writing and reading, before the sigmoid, (B, T, G + H).
            context: masks of the call.
        """
        (B, T, _, d), (H, G) = qk.shape, self.heads
        C, R = min(T, CHUNK), H // G
        qk, v = F.normalize(dpfp(qk, self.features) if self.features else qk, dim=-1, eps=1e-6), widen(v)
        strengths = torch.sigmoid(widen(gates))[..., None]
        if padding := -T % C:  # zero keys write nothing
            qk, v, strengths = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (qk, v, strengths))
        q, k, v = (_by_head(x, G, C) for x in (*qk.split_with_sizes([H, G], dim=2), v))
        write, read = (_by_head(x, G, C) for x in strengths.split_with_sizes([G, H], dim=2))
        start = widen(self.start)
        W = (store if context.has_store is None else torch.where(context.has_store, store, start)).flatten(0, 1)
        error, weighted_key = write * v, write * k
        last_key, old_key = k, weighted_key  # keys that write the chunk's final W, and keys that read its initial W
        if context.mixed:  # a document that began inside the chunk reads the learned start, not the initial W
            start = start.expand(B, -1, -1, -1).flatten(0, 1)
            error = error - context.after_boundary * (weighted_key @ start)
            old_key, last_key = weighted_key * (1 - context.after_boundary), k * context.in_last_document
        if C > 1:
            system = (weighted_key @ k.mT) * context.strict_store_mask
            error, old_key = torch.linalg.solve_triangular(
                system, torch.cat([error, old_key], dim=-1), upper=False, unitriangular=True
            ).split_with_sizes([d, k.shape[-1]], dim=-1)
        initial, errors = [], []
        for i, chunk in enumerate(zip(error.unbind(), old_key.unbind(), last_key.unbind(), strict=True)):
            initial.append(W)
            errors.append(torch.baddbmm(chunk[0], chunk[1], W, alpha=-1))
            base = torch.where(context.same_document[i], W, start) if context.mixed else W
            W = torch.baddbmm(base, chunk[2].mT, errors[i])
        if C > 1:
            masks = context.store_mask, context.after_boundary
            mask, after_boundary = (
                x.repeat_interleave(R, dim=-2) if R > 1 and isinstance(x, Tensor) else x for x in masks
            )
            retrieved = q @ torch.stack(initial)
            if context.mixed:
                retrieved = torch.lerp(retrieved, q @ start, after_boundary)
            retrieved = retrieved + ((q @ k.mT) * mask) @ torch.stack(errors)
        else:  # a token reads its own write
            retrieved = q @ W
        retrieved = F.rms_norm(retrieved, (d,), eps=self.norm.eps) * read
        retrieved = retrieved.view(-1, B, G, C, R, d).permute(1, 0, 3, 2, 4, 5).reshape(B, -1, H, d)
        retrieved = retrieved * widen(self.norm.weight)
        if padding:
            retrieved = retrieved[:, :T]
        return retrieved.flatten(2), W.unflatten(0, (B, G))


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Return 2 d nu features of x (..., d): products of its channels, with both signs apart, and their neighbours.

    The deterministic parameter-free projection (DPFP) of Schlag et al., 2021, "Linear Transformers Are Secretly Fast
    Weight Programmers". They separate keys better than the channels do, so W holds more values.
    """
    halves = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
    return torch.cat([halves * halves.roll(i, dims=-1) for i in range(1, nu + 1)], dim=-1)


def _by_head(x: Tensor, heads: int, C: int) -> Tensor:
    """Return x, (B, N * C, heads * R, d), as (N, B * heads, C * R, d); each token of a chunk has R rows per head."""
    B, T, rows, d = x.shape
    parts = x.view(B, T // C, C, heads, rows // heads, d).permute(1, 0, 3, 2, 4, 5)
    return parts.reshape(T // C, B * heads, C * rows // heads, d)


class _Convolution(torch.autograd.Function):
    """y_t = sum over i of taps_i x_(t + i) mask_it.

    Shapes: x (B, 4 + T, ...), taps (5, ...), mask (5, B, T, ...) or None, y (B, T, ...). The gradient is written by
    hand, because PyTorch's gradient of each slice of x is as large as x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps, mask)
        y = x.new_zeros(())
        for i, tap in enumerate(taps):
            part = x[:, i : x.shape[1] - TAPS + i]
            y = torch.addcmul(y, part if mask is None else part * mask[i], tap)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,), (x, taps, mask) = gradients, ctx.saved_tensors
        dx, dtaps = torch.zeros_like(x), []
        for i, tap in enumerate(taps):
            masked, part = dy if mask is None else dy * mask[i], slice(i, x.shape[1] - TAPS + i)
            dx[:, part].addcmul_(masked, tap)
            dtaps.append((masked * x[:, part]).sum((0, 1)))
        return dx, torch.stack(dtaps), None
