"""One layer: tokens attend to slots, look-back and each other, and use the store; a segment's end updates the slots."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.attention import KEY_VALUE, QUERY, AttentionPooling, QKVBlock
from rmkv_cli.model.cells import RecurrentMemoryCell
from rmkv_cli.model.feed_forward import FeedForward
from rmkv_cli.model.positions import Rotation, rotate
from rmkv_cli.model.store import AssociativeStore


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


@dataclass(frozen=True)
class View:
    """Who sees whom while T tokens of one segment are read; the same for all layers.

    The K keys are: m slots, m fresh slots (which a document that has no memory yet sees instead), n remembered tokens
    (look-back, then the open segment's), and the T new ones.
    """

    begins: bool
    """The tokens are the segment's first: the memory's keys and values are made."""
    ends: bool
    """The tokens are the segment's last: the memory is updated."""
    token_mask: Tensor
    """(B, 1, T, K), True: seen."""
    memory_mask: Tensor
    """(B, 1, 1, 2m + S), True: seen: over slots, fresh slots and the segment's tokens."""
    fresh: Tensor
    """(B, 1, 1), True: the segment's last document has no memory yet."""
    own: Tensor
    """(B, T), True: the token's document wrote the store."""
    same: Tensor
    """(B, T, T), True: both tokens are of the same document."""
    follows: Tensor
    """(B, T, 1), True: the token before is of the same document."""
    by: Rotation | None
    """Of the T tokens, by their offset in their segment."""
    back: Rotation | None
    """Of the look-back's keys, from this segment's frame to the next one's."""


class RMKVBlock(nn.Module):
    """A layer of RMKV: attention over memory and tokens, pooling, the memory's cell, and the feed-forward if any.

    Its index, from 0, tells whether it has a store.
    """

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        self.slots, self.lookback = config.memory.slots, config.lookback
        self.published = config.memory.update == "published"
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention = QKVBlock(config)
        self.pooling = AttentionPooling(config) if config.memory.updated else None
        self.cell = RecurrentMemoryCell(config) if config.memory.updated else None
        self.store = AssociativeStore(config) if index < config.stores else None
        self.feed_forward = FeedForward(config) if config.intermediate_size else None
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size) if config.intermediate_size else None

    def forward(self, x: Tensor, fresh: Tensor, layer: Layer, view: View) -> tuple[Tensor, Layer]:
        """Read T tokens of one segment: x (B, T, D) -> x'' (B, T, D), and the layer's new part of the state.

        Args:
            x: the token stream, (B, T, D).
            fresh: the learned memory that a document starts with, (m, D).
            layer: what earlier tokens and segments left.
            view: who sees whom.
        """
        h = self.norm(x)
        q, k, v = self.attention.project(h)
        rotated_q, rotated_k = (q, k) if view.by is None else (rotate(q, view.by), rotate(k, view.by))
        keys, values = layer.keys, layer.values
        if view.begins:
            slots = torch.cat([layer.memory, fresh.expand_as(layer.memory)], dim=1).to(fresh.dtype)
            slot_keys, slot_values = self.attention.project(self.norm(slots), KEY_VALUE)
            keys, values = torch.cat([slot_keys, keys], dim=2), torch.cat([slot_values, values], dim=2)
        keys, values = torch.cat([keys, rotated_k], dim=2), torch.cat([values, v], dim=2)
        heads = self.attention(rotated_q, keys, values, view.token_mask)
        store, recent = layer.store, layer.recent
        if self.store is not None and store is not None and recent is not None:
            sought, bound, recent = self.store.convolve(q, k, recent, view.follows)
            gates = self.store.gates(torch.cat([h, heads], dim=2))
            found, store = self.store(store, sought, bound, v, gates, view.own, view.same)
            heads = heads + found
        y = self.attention.out(heads)
        residual = x + y
        stream = torch.cat([layer.stream, y if self.published else residual], dim=1)
        layer = replace(layer, store=store, recent=recent, keys=keys, values=values, stream=stream)
        if view.ends:
            layer = self._close(fresh, layer, view)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return residual, layer
        return residual + self.feed_forward(self.feed_forward_norm(residual)), layer

    def _close(self, fresh: Tensor, layer: Layer, view: View) -> Layer:
        """Update the memory from the whole segment, and keep only the look-back of its tokens."""
        memory, cell = self._update(fresh, layer, view)
        # Copies, so that the state does not hold on to the whole segment.
        keys, values = (x[:, :, x.shape[2] - self.lookback :].clone() for x in (layer.keys, layer.values))
        if view.back is not None:
            keys = rotate(keys, view.back)
        stream = layer.stream.new_zeros(len(keys), 0, layer.stream.shape[2])
        return replace(layer, memory=memory, cell=cell, keys=keys, values=values, stream=stream)

    def _update(self, fresh: Tensor, layer: Layer, view: View) -> tuple[Tensor, Tensor | None]:
        """Return the slots' new memory, and the LSTM's cell state."""
        if self.pooling is None or self.cell is None:
            return layer.memory, None
        memory = torch.where(view.fresh, fresh, layer.memory)
        cell = None if layer.cell is None else torch.where(view.fresh, 0.0, layer.cell)
        length = layer.stream.shape[1]
        (q,) = self.attention.project(self.norm(memory.to(fresh.dtype)), QUERY)
        seen = [
            torch.cat([x[:, :, : 2 * self.slots], x[:, :, x.shape[2] - length :]], dim=2)
            for x in (layer.keys, layer.values)
        ]
        y = self.attention.out(self.attention(q, *seen, view.memory_mask))
        p = self.pooling(layer.stream, view.memory_mask[:, 0, :, 2 * self.slots :])
        if self.published:
            return self.cell(p, y, cell)
        return self.cell(p + y, memory, cell)
