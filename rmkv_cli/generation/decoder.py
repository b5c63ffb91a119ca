"""Decoding: texts that are written side by side, one token each a step, in buffers of a fixed size."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rmkv_cli.model import RMKV, RMKVBlock, State, reading
from rmkv_cli.model.attention import KEY_VALUE
from rmkv_cli.model.positions import rotate, rotation
from rmkv_cli.model.store import TAPS

GRAPHS = 8  # compiled batch sizes; PyTorch's recompile_limit, beyond which it runs a function uncompiled


class Decoder:
    """Holds the states of up to `lanes` texts, one batch; a step reads one token of each and tells what follows.

    A step is the model's forward pass for one token, written for speed: keys, values and what the pooling will read are
    put in their places, nothing is copied or grows. A segment's last token, which updates the memory, is read by the
    model itself. Texts come and go between steps, each at its own place in its segment; `len(decoder)` are held.

    With `compiled` PyTorch compiles the step, with CUDA graphs on a GPU. This takes a minute for each of a few batch
    sizes: `lanes`, half of it, a quarter and so on. Other numbers of texts are padded to the next size.
    """

    def __init__(self, model: RMKV, lanes: int = 1, *, compiled: bool = False) -> None:
        config, like = model.config, model.memory.detach()
        L, B, H, d = config.num_hidden_layers, lanes, config.num_attention_heads, config.head_size
        self.lanes = lanes
        self._model, self._length = model, config.segment_length
        self._blocks = [block for block in model.blocks if isinstance(block, RMKVBlock)]
        self._slots = 2 * config.memory.slots  # keys of slots and fresh slots
        self._first = self._slots + config.lookback  # where the open segment's keys begin
        K = self._first + self._length
        self._keys, self._values = like.new_zeros(L, B, H, K, d), like.new_zeros(L, B, H, K, d)
        self._seen = torch.zeros(B, 1, 1, K, dtype=torch.bool, device=like.device)
        self._stream = like.new_zeros(L, B, self._length, config.hidden_size)
        self._store = like.new_zeros(config.stores, B, H, d, d)
        self._recent = like.new_zeros(config.stores, B, 2 * H, TAPS, d)
        self._position = torch.zeros(B, dtype=torch.int64, device=like.device)
        self._offset, self._filled = torch.zeros_like(self._position), torch.zeros_like(self._position)
        self._turns = rotation(torch.arange(self._length, device=like.device)[None], d, like.dtype)  # by offset
        self._states: list[State] = []  # as last put in
        self._read_since: list[int] = []  # tokens of them
        self._step = self._read
        if compiled:
            for buffer, _ in self._buffers():
                torch._dynamo.mark_static_address(buffer)
            mode = "reduce-overhead" if like.is_cuda else "default"
            self._compiled = torch.compile(self._read, dynamic=False, mode=mode)
            self._step = self._read_padded

    def __len__(self) -> int:
        """Return how many texts are held."""
        return len(self._states)

    @torch.inference_mode()
    def add(self, state: State) -> None:
        """Take in a text by the state (of batch 1) after what is read of it; it becomes the batch's last."""
        if len(self) == self.lanes:
            raise ValueError(f"all {self.lanes} lanes are taken")
        lane = len(self)
        for buffer, batch in self._buffers():  # masked entries have no effect unless they are NaN
            buffer.select(batch, lane).zero_()
        self._put(lane, state)
        self._states.append(state)
        self._read_since.append(0)

    def remove(self, lane: int) -> None:
        """Let go of a text; the batch's last one takes its place."""
        last = len(self) - 1
        if lane != last:
            for buffer, batch in self._buffers():
                buffer.select(batch, lane).copy_(buffer.select(batch, last))
            self._states[lane], self._read_since[lane] = self._states[last], self._read_since[last]
        del self._states[last], self._read_since[last]

    def clear(self) -> None:
        """Remove all texts, even after a failed step."""
        self._states.clear()
        self._read_since.clear()
        for buffer, _ in self._buffers():
            buffer.zero_()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read the next token of each of the B texts held, (B,); return the logits after them, (B, V) float32."""
        tokens = tokens.to(self._seen.device)
        with reading(self._model):
            full = [lane for lane in range(len(self)) if self._filled_of(lane) == self._length - 1]
            closed = [self._model.hidden(tokens[lane, None, None], self.state(lane)) for lane in full]
            if len(full) < len(self):
                hidden = self._step(tokens).clone()
            else:
                hidden = self._keys.new_empty(len(self), self._model.config.hidden_size)
            self._read_since = [count + 1 for count in self._read_since]
            for lane, (output, state) in zip(full, closed, strict=True):
                hidden[lane] = output[0, 0]
                self._states[lane], self._read_since[lane] = state, 0
                self._put(lane, state)
            return self._model.head(hidden).float()

    @torch.inference_mode()
    def state(self, lane: int) -> State:
        """Return the state of a text, of batch 1, apart from the buffers."""
        state, new, filled = self._states[lane], self._read_since[lane], self._filled_of(lane)
        if not new:
            return state
        part = slice(lane, lane + 1)
        begin, end = (0 if filled else self._slots), self._first + filled
        document = state.document.clamp(min=0)
        return replace(
            state,
            store=None if state.store is None else self._store[:, part].clone(),
            recent=None if state.recent is None else self._recent[:, part].clone(),
            keys=tuple(x[part, :, begin:end].clone() for x in self._keys),
            values=tuple(x[part, :, begin:end].clone() for x in self._values),
            stream=tuple(x[part, :filled].clone() for x in self._stream),
            documents=torch.cat([state.documents, document[:, None].expand(1, new)], dim=1),
            document=document,
            store_owner=document,
            position=self._position[part].clone(),
            offset=self._offset[part].clone(),
            filled=filled,
        )

    def _buffers(self) -> list[tuple[Tensor, int]]:
        """Return what holds the texts, each buffer with the dimension that is its batch."""
        stacked = (self._keys, self._values, self._stream, self._store, self._recent)
        return [*((x, 1) for x in stacked), *((x, 0) for x in (self._seen, self._position, self._offset, self._filled))]

    def _filled_of(self, lane: int) -> int:
        return self._states[lane].filled + self._read_since[lane]

    def _put(self, lane: int, state: State) -> None:
        """Lay a state out in the lane's part of the buffers."""
        config = self._model.config
        document, m = state.document.clamp(min=0), config.memory.slots
        begin, end = self._slots if state.filled == 0 else 0, self._first + state.filled
        for i, layer in enumerate(state.layers()):
            block = self._blocks[i]
            if state.filled == 0 and m:
                slots = torch.cat([layer.memory, self._model.memory[i].expand_as(layer.memory)], dim=1)
                keys, values = block.attention.project(block.norm(slots), KEY_VALUE)
                self._keys[i, lane, :, :begin], self._values[i, lane, :, :begin] = keys[0], values[0]
            self._keys[i, lane, :, begin:end], self._values[i, lane, :, begin:end] = layer.keys[0], layer.values[0]
            self._stream[i, lane, : state.filled] = layer.stream[0]
            if block.store is not None and layer.store is not None and layer.recent is not None:
                own = bool(state.store_owner == document)
                self._store[i, lane] = layer.store[0] if own else block.store.start
                self._recent[i, lane] = layer.recent[0]
        kept = bool(state.owner == document) and config.memory.updated
        seen = self._seen[lane, 0, 0]
        seen[:m], seen[m : 2 * m] = kept, not kept
        seen[self._slots : end] = state.documents[0] == document
        seen[end:] = False
        self._position[lane], self._offset[lane], self._filled[lane] = state.position[0], state.offset[0], state.filled

    def _read_padded(self, tokens: Tensor) -> Tensor:
        """Run the compiled `_read` in one of the few batch sizes."""
        B = len(tokens)
        size = min(size for i in range(GRAPHS) if (size := self.lanes >> i) >= B)
        for counter in (self._position, self._offset, self._filled):
            counter[B:size] = 0  # empty lanes stay at a segment's beginning
        return self._compiled(F.pad(tokens, (0, size - B)))[:B]

    def _read(self, tokens: Tensor) -> Tensor:
        """Read a token of each text, (B,), inside their segments; return what the head reads, (B, D)."""
        model, B = self._model, len(tokens)
        position, filled = self._position[:B, None], self._filled[:B, None, None]
        place = (self._first + filled)[..., None]
        seen = self._seen[:B].scatter_(3, place, True)
        by = None
        if model.config.position == "rotary":
            cos, sin = (turns[:, 0, self._offset[:B]].view(B, 1, 1, -1) for turns in self._turns)
            by = cos, sin
        x = model.embed(tokens[:, None], position)
        for i, block in enumerate(self._blocks):
            h = block.norm(x)
            q, k, v = block.attention.project(h)
            rotated_q, rotated_k = (q, k) if by is None else (rotate(q, by), rotate(k, by))
            at = place.expand_as(k)
            keys, values = self._keys[i, :B].scatter_(2, at, rotated_k), self._values[i, :B].scatter_(2, at, v)
            heads = block.attention(rotated_q, keys, values, seen)
            if block.store is not None:
                store, recent = self._store[i, :B], self._recent[i, :B]
                gates = block.store.gates(torch.cat([h, heads], dim=2))
                heads = heads + block.store.step(store, recent, q, k, v, gates, position > 0)
            y = block.attention.out(heads)
            residual = x + y
            self._stream[i, :B].scatter_(1, filled.expand_as(x), y if block.published else residual)
            x = residual
            if block.feed_forward is not None and block.feed_forward_norm is not None:
                x = x + block.feed_forward(block.feed_forward_norm(x))
        for counter in (self._position, self._offset, self._filled):
            counter[:B] += 1
        return model.norm(x)[:, 0]
