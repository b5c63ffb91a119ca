"""One layer: tokens attend to slots, look-back and each other, and use the store; a segment's end updates the slots."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.attention import AttentionPooling, QKVBlock
from rmkv_cli.model.cells import RecurrentMemoryCell
from rmkv_cli.model.feed_forward import FeedForward
from rmkv_cli.model.norm import make_norm
from rmkv_cli.model.positions import rotate
from rmkv_cli.model.precision import wide
from rmkv_cli.model.store import AssociativeStore
from rmkv_cli.model.view import View


@dataclass(frozen=True)
class Layer:
    """One layer's part of the state (see `State`)."""

    memory: Tensor
    cell: Tensor | None
    store: Tensor | None
    recent: Tensor | None
    keys: Tensor
    values: Tensor
    stream: Tensor


class RMKVBlock(nn.Module):
    """A layer of RMKV: attention over memory and tokens, pooling, the memory's cell, and the feed-forward if any.

    Its index, from 0, tells whether it has a store.
    """

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        self.slots, self.lookback = config.memory.slots, config.lookback
        self.published = config.memory.update == "published"
        self.norm = make_norm(config)
        self.attention = QKVBlock(config)
        self.pooling = AttentionPooling(config) if config.memory.updated else None
        self.cell = RecurrentMemoryCell(config) if config.memory.updated else None
        self.store = AssociativeStore(config) if index < config.stores else None
        self.feed_forward = FeedForward(config) if config.intermediate_size else None
        self.feed_forward_norm = make_norm(config) if config.intermediate_size else None

    def forward(self, x: Tensor, fresh: Tensor, layer: Layer, view: View) -> tuple[Tensor, Layer]:
        """Read T tokens of one segment: x (B, T, D) -> x'' (B, T, D), and the layer's new part of the state.

        Slots and tokens go through norm, projections and attention together.

        Args:
            x: the token stream, (B, T, D).
            fresh: the learned memory that a document starts with, (m, D).
            layer: what earlier tokens and segments left.
            view: who sees whom.
        """
        T = x.shape[1]
        memory, slots = layer.memory, []
        if view.place is None and self.slots:
            start = wide(fresh)
            memory = torch.where(view.has_memory, layer.memory, start)
            slots = [torch.where(view.has_memory, start, layer.memory), memory] if view.mixed else [memory]
        h = self.norm(torch.cat([*(each.to(x.dtype) for each in slots), x], dim=1) if slots else x)
        n = h.shape[1] - T
        qk, v = self.attention.project(h)
        turned = (qk if view.rope is None else rotate(qk, view.rope)).transpose(1, 2)
        q, k = turned.split_with_sizes(self.attention.heads[:2], dim=1)  # (B, H, n + T, d), (B, G, n + T, d)
        keys, values = _join(layer.keys, k, n, view), _join(layer.values, v.transpose(1, 2), n, view)
        asking = self.slots if view.ends and self.cell is not None else 0
        heads = self.attention(q[:, :, n - asking :] if n > asking else q, keys, values, view.mask)
        store, recent = layer.store, layer.recent
        if self.store is not None and store is not None and recent is not None:
            of_slots, heads = heads.split_with_sizes([asking, T], dim=1)
            gates = self.store.gates(torch.cat([h[:, n:], heads], dim=2).to(self.store.gates.weight.dtype))
            found, store, recent = self.store(store, recent, qk[:, n:], v[:, n:], gates, view)
            heads = torch.cat([of_slots, heads + found], dim=1) if asking else heads + found
        for_slots, y = self.attention.out(heads).split_with_sizes([asking, T], dim=1)
        residual = x + y
        read = y if self.published else residual
        if view.place is not None:
            stream = _put(layer.stream, 1, view.place[1], read)
        else:
            stream = torch.cat([layer.stream, read], dim=1) if layer.stream.shape[1] else read
            remembered = self.lookback if view.ends else layer.keys.shape[2] + T
            keys, values = (each[:, :, each.shape[2] - remembered :] for each in (keys, values))
            if view.ends:  # copies, so that the state does not hold on to the whole segment
                keys, values = (each.clone(memory_format=torch.contiguous_format) for each in (keys, values))
                keys = keys if view.rope_shift is None else rotate(keys, view.rope_shift)
        layer = replace(layer, store=store, recent=recent, keys=keys, values=values, stream=stream)
        if view.ends:
            layer = self._close(memory, for_slots, layer, view)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return residual, layer
        return residual + self.feed_forward(self.feed_forward_norm(residual)), layer

    def _close(self, memory: Tensor, for_slots: Tensor, layer: Layer, view: View) -> Layer:
        """Update the slots (B, m, D) from the segment's stream and from what attention found for them (B, m, D)."""
        stream = layer.stream.new_zeros(len(layer.stream), 0, layer.stream.shape[2])
        if self.pooling is None or self.cell is None:
            return replace(layer, stream=stream)
        cell = None if layer.cell is None else torch.where(view.has_memory, layer.cell, 0.0)
        p = self.pooling(layer.stream, view.pooling_mask)
        if self.published:
            memory, cell = self.cell(p, wide(for_slots), cell)
        else:
            memory, cell = self.cell(p + for_slots, memory, cell)
        return replace(layer, memory=memory, cell=cell, stream=stream)


def _join(kept: Tensor, new: Tensor, n: int, view: View) -> Tensor:
    """Return the keys or values to attend to, (B, G, K, d): those kept, and the new ones of n slots and of tokens."""
    if view.place is not None:
        return _put(kept, 2, view.place[0], new)
    slots, tokens = new.split_with_sizes([n, new.shape[2] - n], dim=2)
    return torch.cat([slots, kept, tokens], dim=2)


def _put(buffer: Tensor, dimension: int, place: Tensor, new: Tensor) -> Tensor:
    """Put new entries into a buffer, in place, and return it."""
    if buffer.dtype != torch.bfloat16:
        return buffer.scatter_(dimension, place, new)
    # On a CPU scatter_ converts all of a bfloat16 buffer to float32 and back.
    buffer.view(torch.int16).scatter_(dimension, place, new.view(torch.int16))
    return buffer
