"""One layer: attention to slots, look-back and tokens, the store, and the slots' update at a segment's end."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.attention import AttentionPooling, QKVBlock
from rmkv_cli.model.cells import RecurrentMemoryCell
from rmkv_cli.model.context import SegmentContext
from rmkv_cli.model.experts import Experts
from rmkv_cli.model.feed_forward import FeedForward
from rmkv_cli.model.norm import make_norm
from rmkv_cli.model.positions import rotate
from rmkv_cli.model.precision import widen
from rmkv_cli.model.store import AssociativeStore


@dataclass(frozen=True)
class LayerState:
    """One layer's part of `State`, which describes the fields."""

    memory: Tensor
    cell: Tensor | None
    store: Tensor | None
    recent: Tensor | None
    keys: Tensor
    values: Tensor
    stream: Tensor


class RMKVBlock(nn.Module):
    """A layer of RMKV: attention over memory and tokens, pooling, the memory's cell, and an optional feed-forward.

    Args:
        config: the model's config.
        index: the layer's index from 0; the first `config.stores` layers have a store.
    """

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        self.slots, self.lookback = config.memory.slots, config.lookback
        D, inner_width = config.hidden_size, config.intermediate_size
        self.published = config.memory.update == "published"
        self.norm = make_norm(config)
        self.attention = QKVBlock(config)
        self.pooling = AttentionPooling(config) if config.memory.updated else None
        self.cell = RecurrentMemoryCell(config) if config.memory.updated else None
        self.store = AssociativeStore(config) if index < config.stores else None
        self.feed_forward = FeedForward(D, inner_width, config.dropout) if inner_width else None
        self.experts = Experts(config) if config.experts else None
        self.feed_forward_norm = make_norm(config) if self.feed_forward or self.experts else None

    def forward(
        self, x: Tensor, initial_memory: Tensor, layer: LayerState, context: SegmentContext
    ) -> tuple[Tensor, LayerState]:
        """Read T tokens of one segment; return the new token stream, (B, T, D), and the layer's new state.

        Slots and tokens go through norm, projections and attention together.

        Args:
            x: the token stream, (B, T, D).
            initial_memory: the learned slots that a document starts with, (m, D).
            layer: the layer's state before these tokens.
            context: masks and rotations of the call.
        """
        T = x.shape[1]
        memory, slots = layer.memory, []
        if context.write_index is None and self.slots:
            initial = widen(initial_memory)
            memory = torch.where(context.has_memory, layer.memory, initial)
            slots = [torch.where(context.has_memory, initial, layer.memory), memory] if context.mixed else [memory]
        h = self.norm(torch.cat([*(each.to(x.dtype) for each in slots), x], dim=1) if slots else x)
        n = h.shape[1] - T
        qk, v = self.attention.project(h)
        rotated = (qk if context.rope is None else rotate(qk, context.rope)).transpose(1, 2)
        q, k = rotated.split_with_sizes(self.attention.heads[:2], dim=1)  # (B, H, n + T, d), (B, G, n + T, d)
        keys, values = _extend(layer.keys, k, n, context), _extend(layer.values, v.transpose(1, 2), n, context)
        updated = self.slots if context.ends_segment and self.cell is not None else 0  # slots among the queries
        heads = self.attention(q[:, :, n - updated :] if n > updated else q, keys, values, context.mask)
        store, recent = layer.store, layer.recent
        if self.store is not None and store is not None and recent is not None:
            slot_heads, heads = heads.split_with_sizes([updated, T], dim=1)
            gates = self.store.gates(torch.cat([h[:, n:], heads], dim=2).to(self.store.gates.weight.dtype))
            retrieved, store, recent = self.store(store, recent, qk[:, n:], v[:, n:], gates, context)
            heads = torch.cat([slot_heads, heads + retrieved], dim=1) if updated else heads + retrieved
        slot_output, y = self.attention.out(heads).split_with_sizes([updated, T], dim=1)
        residual = x + y
        pooled = y if self.published else residual
        if context.write_index is not None:
            stream = _write(layer.stream, context.write_index[::2], pooled)
        else:
            stream = torch.cat([layer.stream, pooled], dim=1) if layer.stream.shape[1] else pooled
            remembered = self.lookback if context.ends_segment else layer.keys.shape[2] + T
            keys, values = (each[:, :, each.shape[2] - remembered :] for each in (keys, values))
            if context.ends_segment:  # copies, so that the state does not keep the whole segment alive
                keys, values = (each.clone(memory_format=torch.contiguous_format) for each in (keys, values))
                keys = keys if context.rope_shift is None else rotate(keys, context.rope_shift)
        layer = replace(layer, store=store, recent=recent, keys=keys, values=values, stream=stream)
        if context.ends_segment:
            layer = self._update_memory(memory, slot_output, layer, context)
        x = residual
        if self.feed_forward_norm is not None:
            n = self.feed_forward_norm(residual)
            for branch in (self.feed_forward, self.experts):
                x = x if branch is None else x + branch(n)
        return x, layer

    def _update_memory(
        self, memory: Tensor, slot_output: Tensor, layer: LayerState, context: SegmentContext
    ) -> LayerState:
        """Return the layer's state at the segment's end.

        The cell updates the slots, (B, m, D), from the pooled stream and the slots' attention output, (B, m, D).
        """
        stream = layer.stream.new_zeros(len(layer.stream), 0, layer.stream.shape[2])
        if self.pooling is None or self.cell is None:
            return replace(layer, stream=stream)
        cell = None if layer.cell is None else torch.where(context.has_memory, layer.cell, 0.0)
        p = self.pooling(layer.stream, context.pooling_mask)
        if self.published:
            memory, cell = self.cell(p, widen(slot_output), cell)
        else:
            memory, cell = self.cell(p + slot_output, memory, cell)
        return replace(layer, memory=memory, cell=cell, stream=stream)


def _extend(remembered: Tensor, new: Tensor, n: int, context: SegmentContext) -> Tensor:
    """Return the keys or values to attend to, (B, G, K, d): new ones of n slots, the remembered, new ones of tokens."""
    if context.write_index is not None:
        return _write(remembered.transpose(1, 2), context.write_index[:2], new.transpose(1, 2)).transpose(1, 2)
    slots, tokens = new.split_with_sizes([n, new.shape[2] - n], dim=2)
    return torch.cat([slots, remembered, tokens], dim=2)


def _write(buffer: Tensor, place: tuple[Tensor, ...], new: Tensor) -> Tensor:
    """Write one new entry of each row, (B, 1, ...), into a buffer, (B, K, ...), in place, and return the buffer."""
    return buffer.index_put_(place, new[:, 0])
