"""Decode a batch of texts, one token each per step, in buffers of a fixed size."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rmkv_cli.model import RMKV, RMKVBlock, State, inference
from rmkv_cli.model.block import LayerState
from rmkv_cli.model.context import TAPS, SegmentContext, make_recent_mask
from rmkv_cli.model.positions import rotation
from rmkv_cli.model.precision import widen

GRAPHS = 8  # compiled batch sizes
DEEP = 12  # layers from which a CPU compiles a single layer in place of the whole step


class Decoder:
    """Holds the states of up to `lanes` texts in one batch; a step reads a token of each and returns the next logits.

    A step is the forward pass for one token of each text. It writes keys, values and the inputs of the pooling into
    their places in the buffers, so nothing grows. The model itself reads a segment's last token, which updates the
    memory. Texts join and leave between steps, each at its own position in its segment; there are `len(decoder)`.

    With `compiled` PyTorch compiles the step for each of a few batch sizes: `lanes`, half of it, a quarter and so on.
    Other numbers of texts are padded to the next size. The step is one graph, on a GPU a CUDA graph. On a CPU, layers
    of a deep model share one graph instead, which compiles in seconds rather than minutes.
    """

    def __init__(self, model: RMKV, lanes: int = 1, *, compiled: bool = False) -> None:
        config, like = model.config, model.norm.weight.detach()
        B, H, G, d = lanes, config.num_attention_heads, config.key_value_heads, config.head_width
        self.lanes = lanes
        self._model, self._length = model, config.segment_length
        self._first = config.memory.slots + config.lookback  # where the open segment's keys begin
        K = self._first + self._length
        self._blocks: list[RMKVBlock] = []
        self._layers: list[LayerState] = []
        for block in model.blocks:
            assert isinstance(block, RMKVBlock)
            has_store = block.store is not None
            layer = LayerState(
                memory=like.new_empty(0),
                cell=None,
                store=widen(like.new_zeros(B, G, config.store_key_width, d)) if has_store else None,
                recent=like.new_zeros(B, H + G, TAPS, d) if has_store else None,
                keys=like.new_zeros(B, G, K, d),
                values=like.new_zeros(B, G, K, d),
                stream=like.new_zeros(B, self._length, config.hidden_size),
            )
            self._blocks.append(block)
            self._layers.append(layer)
        self._mask = like.new_full((B, 1, 1, K), -torch.inf)
        self._position = torch.zeros(B, dtype=torch.int64, device=like.device)
        self._offset, self._filled = torch.zeros_like(self._position), torch.zeros_like(self._position)
        self._turns = rotation(config, torch.arange(self._length, device=like.device), like.dtype)  # by offset
        self._states: list[State] = []  # of each lane when its segment or text began
        self._read_since: list[int] = []  # tokens read after these states
        self._step, self._fixed, self._read_layer = self._read, compiled, _read_layer
        if compiled:
            for buffer in self._buffers():
                torch._dynamo.mark_static_address(buffer)
            compiler = partial(torch.compile, fullgraph=True, dynamic=False, isolate_recompiles=True)
            self._compiled = self._read
            if like.is_cuda or len(self._blocks) < DEEP:
                self._compiled = compiler(self._read, mode="reduce-overhead" if like.is_cuda else "default")
            else:
                self._read_layer = compiler(_read_layer, recompile_limit=2 * GRAPHS)  # with a store, and without
            self._step = self._read_padded

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._states)

    @torch.inference_mode()
    def add(self, state: State) -> None:
        """Append a text to the batch, given the state (of batch 1) after its tokens so far."""
        if len(self) == self.lanes:
            raise ValueError(f"all {self.lanes} lanes are in use")
        lane = len(self)
        for buffer in self._buffers():  # masked entries have no effect unless they are NaN
            buffer[lane] = 0
        self._put(lane, state)
        self._states.append(state)
        self._read_since.append(0)

    def remove(self, lane: int) -> None:
        """Remove a text; the last one of the batch takes its lane."""
        last = len(self) - 1
        if lane != last:
            for buffer in self._buffers():
                buffer[lane] = buffer[last]
            self._states[lane], self._read_since[lane] = self._states[last], self._read_since[last]
        del self._states[last], self._read_since[last]

    def clear(self) -> None:
        """Remove all texts, even after a failed step."""
        self._states.clear()
        self._read_since.clear()
        for buffer in self._buffers():
            buffer.zero_()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of each of the B texts, (B,); return the following logits, (B, V) float32."""
        tokens = tokens.to(self._mask.device)
        with inference(self._model):
            full = [lane for lane in range(len(self)) if self._filled_of(lane) == self._length - 1]
            closed = [self._model.hidden(tokens[lane, None, None], self.state(lane)) for lane in full]
            if len(full) < len(self):
                hidden = self._step(tokens).clone()
            else:
                hidden = self._mask.new_empty(len(self), self._model.config.hidden_size)
            self._read_since = [count + 1 for count in self._read_since]
            for lane, (output, state) in zip(full, closed, strict=True):
                hidden[lane] = output[0, 0]
                self._states[lane], self._read_since[lane] = state, 0
                self._put(lane, state)
            return self._model.head(hidden).float()

    @torch.inference_mode()
    def state(self, lane: int) -> State:
        """Return a copy of the state of a text, of batch 1."""
        state, new, filled = self._states[lane], self._read_since[lane], self._filled_of(lane)
        if not new:
            return state
        part = slice(lane, lane + 1)
        begin, end = self._model.config.memory.slots, self._first + filled
        document = state.document.clamp(min=0)
        stores, recents = ([x[part] for x in parts if x is not None] for parts in self._stores())
        return replace(
            state,
            store=torch.stack(stores) if stores else None,
            recent=torch.stack(recents) if recents else None,
            keys=tuple(layer.keys[part, :, begin:end].clone() for layer in self._layers),
            values=tuple(layer.values[part, :, begin:end].clone() for layer in self._layers),
            stream=tuple(layer.stream[part, :filled].clone() for layer in self._layers),
            documents=torch.cat([state.documents, document[:, None].expand(1, new)], dim=1),
            document=document,
            store_owner=document,
            position=self._position[part].clone(),
            offset=self._offset[part].clone(),
            filled=filled,
        )

    def _stores(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        return [layer.store for layer in self._layers], [layer.recent for layer in self._layers]

    def _buffers(self) -> list[Tensor]:
        """Return all buffers; their first dimension is the batch."""
        rows = [self._mask, self._position, self._offset, self._filled]
        for layer in self._layers:
            parts = (layer.keys, layer.values, layer.stream, layer.store, layer.recent)
            rows += [x for x in parts if x is not None]
        return rows

    def _filled_of(self, lane: int) -> int:
        return self._states[lane].filled + self._read_since[lane]

    def _put(self, lane: int, state: State) -> None:
        """Write a state into the lane's part of the buffers."""
        config, part = self._model.config, slice(lane, lane + 1)
        document, m, end = state.document.clamp(min=0), config.memory.slots, self._first + state.filled
        kept = bool(state.owner == document) and config.memory.updated
        own = bool(state.store_owner == document)
        for block, into, layer, fresh in zip(
            self._blocks, self._layers, state.layers(), self._model.memory.unbind(), strict=True
        ):
            slots = layer.memory if kept else fresh.expand_as(layer.memory)
            qk, v = block.attention.project(block.norm(slots.to(into.keys.dtype)))
            k = qk[:, :, -v.shape[2] :]
            for buffer, of_slots, of_tokens in ((into.keys, k, layer.keys), (into.values, v, layer.values)):
                buffer[part, :, :m], buffer[part, :, m:end] = of_slots.transpose(1, 2), of_tokens
            into.stream[part, : state.filled] = layer.stream
            if block.store is not None and into.store is not None and into.recent is not None:
                assert layer.store is not None
                assert layer.recent is not None
                into.store[part] = layer.store if own else block.store.start
                into.recent[part] = layer.recent
        mask = self._mask[lane, 0, 0].fill_(-torch.inf)
        if config.memory.fresh == "visible" or state.owner == document:
            mask[:m] = 0
        mask[m:end].masked_fill_(state.documents[0] == document, 0)
        self._position[lane], self._offset[lane], self._filled[lane] = state.position[0], state.offset[0], state.filled

    def _read_padded(self, tokens: Tensor) -> Tensor:
        """Run the compiled `_read`, padded to one of its few batch sizes."""
        B = len(tokens)
        size = min(size for i in range(GRAPHS) if (size := self.lanes >> i) >= B)
        for counter in (self._position, self._offset, self._filled):
            counter[B:size] = 0  # empty lanes stay at a segment's beginning
        return self._compiled(F.pad(tokens, (0, size - B)))[:B]

    def _read(self, tokens: Tensor) -> Tensor:
        """Read a token of each text, (B,), none of them its segment's last; return the inputs of the head, (B, D)."""
        model, B, end = self._model, len(tokens), self._first + self._most()
        config, position, filled = model.config, self._position[:B], self._filled[:B]
        turns = tuple(x[self._offset[:B], None, None] for x in self._turns)
        context = SegmentContext(
            ends_segment=False,
            mixed=False,
            has_memory=self._mask[:B, 0],  # which counts at a segment's end alone, like the next
            mask=self._mask[:B].scatter_(3, self._first + filled[:, None, None, None], 0.0)[..., :end],
            pooling_mask=self._mask[:B, 0],
            rope=(turns[0], turns[1]) if config.position == "rotary" else None,
            rope_shift=None,
            has_store=None,
            recent_mask=make_recent_mask(position, self._mask.dtype),
            write_index=(torch.arange(B, device=tokens.device), self._first + filled, filled),
        )
        x = model.embed(tokens[:, None], position[:, None])
        for block, layer in zip(self._blocks, self._layers, strict=True):
            store, recent = (None if x is None else x[:B] for x in (layer.store, layer.recent))
            keys, values = layer.keys[:B, :, :end], layer.values[:B, :, :end]
            lanes = LayerState(layer.memory, None, store, recent, keys, values, layer.stream[:B])
            x = self._read_layer(block, x, lanes, context)
        for counter in (self._position, self._offset, self._filled):
            counter[:B] += 1
        return model.norm(x)[:, 0]

    def _most(self) -> int:
        """Return how many tokens of the segments' buffers a step reads.

        A compiled step reads all, because its shapes are fixed; others read as many as the longest segment has.
        """
        return self._length if self._fixed else 1 + max(map(self._filled_of, range(len(self))))


def _read_layer(block: RMKVBlock, x: Tensor, lanes: LayerState, context: SegmentContext) -> Tensor:
    """Read a token of each text in one layer, (B, 1, D); write into its buffers and return its output, (B, 1, D)."""
    x, after = block(x, lanes.memory, lanes, context)
    if lanes.store is not None and lanes.recent is not None:
        lanes.store.copy_(after.store)
        lanes.recent.copy_(after.recent)
    return x
