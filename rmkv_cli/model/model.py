"""The model: embeddings, the segment loop with its carried state, and the head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model import pretrained
from rmkv_cli.model.block import RMKVBlock, View
from rmkv_cli.model.cells import memory_dtype
from rmkv_cli.model.positions import rotation, sinusoids
from rmkv_cli.model.state import State
from rmkv_cli.model.store import TAPS, AssociativeStore

NONE = -1  # no document


class RMKV(nn.Module):
    """A causal language model that reads a text segment by segment and carries a fixed state along.

    One call over a whole text, calls over its pieces with the state handed on, and calls token by token give the same
    logits. Tokens of different documents never see each other, nor a memory that another document wrote.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, layers = config.hidden_size, config.num_hidden_layers
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.position = nn.Embedding(config.max_position_embeddings, D) if config.position == "learned" else None
        self.through_layers = config.memory.carry == "layers"
        # What a document's memory is before its first segment has ended; the slots' identities.
        self.memory = nn.Parameter(torch.empty(1 if self.through_layers else layers, config.memory.slots, D))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(RMKVBlock(config, index) for index in range(layers))
        self._compiled: list[Any] = []  # the same blocks; a list, so that they are not counted twice
        self.norm = nn.LayerNorm(D)
        self.unembedding = None if config.tie_word_embeddings else nn.Linear(D, config.vocab_size, bias=False)
        for table in (self.embedding.weight, self.memory, *([self.position.weight] if self.position else [])):
            nn.init.normal_(table, std=0.02)

    def forward(
        self, input_ids: Tensor, state: State | None = None, document_ids: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Read tokens; return logits (B, T, V) and the state after them.

        Args:
            input_ids: (B, T) int64.
            state: what came before; fresh where none is given.
            document_ids: (B, T) int64, >= 0 and non-decreasing along a row; where none are given, the state's document
                goes on. A document that the state ends in goes on under the same id.

        Raises:
            ValueError: no tokens; document ids that decrease or are negative; a position beyond a learned table; or a
                model whose memory goes through layers is asked to go on inside a segment.
        """
        if document_ids is not None:
            before = state.document[:, None] if state else torch.full_like(document_ids[:, :1], NONE)
            if (torch.cat([before, document_ids], dim=1).diff() < 0).any() or (document_ids < 0).any():
                raise ValueError("document_ids must be 0 or more and never decrease along a row, nor below the state's")
        hidden, state = self.hidden(input_ids, state, document_ids)
        return self.head(hidden), state

    def hidden(
        self, input_ids: Tensor, state: State | None = None, document_ids: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return what the head reads, (B, T, D), and the state; arguments as in `forward`."""
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids should be (B, T) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
        B, T = input_ids.shape
        if not T:
            raise ValueError("input_ids holds no tokens")
        state = state or self.initial_state(B)
        if document_ids is None:
            document_ids = state.document.clamp(min=0)[:, None].expand(B, T)
        outputs = []
        for start, stop in self.spans(T, state.filled):
            output, state = self.segment(input_ids[:, start:stop], state, document_ids[:, start:stop])
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) for hidden (..., D)."""
        return F.linear(hidden, (self.unembedding or self.embedding).weight)

    def spans(self, length: int, filled: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each segment's part of `length` tokens, when `filled` tokens of one are read."""
        S = self.config.segment_length
        start = 0
        while start < length:
            stop = min(start + S - (filled + start) % S, length)
            yield start, stop
            start = stop

    def segment(self, input_ids: Tensor, state: State, document_ids: Tensor) -> tuple[Tensor, State]:
        """Read tokens (B, T) that lie within one segment; return what the head reads, (B, T, D), and the state."""
        if self.through_layers and state.filled:
            raise ValueError("memory.carry = 'layers' reads whole segments: it cannot go on inside one")
        T, S = input_ids.shape[1], self.config.segment_length
        begins = state.filled == 0
        # A memory that goes through layers is needed after a text's last, shorter segment as well.
        ends = state.filled + T == S or self.through_layers
        position = _count(document_ids, state.document, state.position)
        offset = _count(document_ids, state.document, state.offset)
        documents = torch.cat([state.documents, document_ids], dim=1)
        last = document_ids[:, -1]

        x = self.dropout(self.embed(input_ids, position))
        own = document_ids == state.store_owner[:, None]
        view = self._view(document_ids, documents, state.owner, own, position, offset, begins, ends, state.filled + T)
        layers = list(state.layers())
        for i, block in enumerate(self._compiled if self.training and self._compiled else self.blocks):
            at = 0 if self.through_layers else i  # whose memory this layer reads
            if self.through_layers and i == 1:  # the memory that came up is the last document's
                view = self._view(document_ids, documents, last, own, position, offset, begins, ends, T)
            if self.through_layers and i:
                layers[i] = replace(layers[i], memory=layers[i - 1].memory, cell=layers[i - 1].cell)
            x, layers[i] = block(x, self.memory[at], layers[i], view)
        if self.through_layers:
            layers[0] = replace(layers[0], memory=layers[-1].memory, cell=layers[-1].cell)

        after = State.of_layers(
            layers,
            memories=len(self.memory),
            documents=documents[:, documents.shape[1] - self.config.lookback :] if ends else documents,
            owner=last if ends else state.owner,
            store_owner=last,
            document=last,
            position=position[:, -1] + 1,
            offset=torch.zeros_like(last) if ends else offset[:, -1] + 1,
            filled=(state.filled + T) % S,
        )
        return self.norm(x), after

    def initial_state(self, batch_size: int) -> State:
        """Return the state before any token, for `batch_size` texts."""
        config, device = self.config, self.memory.device
        dtype = self.memory.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        B, D, H, d = batch_size, config.hidden_size, config.num_attention_heads, config.head_size
        empty = tuple(torch.zeros(B, H, config.lookback, d, device=device, dtype=dtype) for _ in self.blocks)
        memory = self.memory.detach().to(memory_dtype(self.memory))[:, None].repeat(1, B, 1, 1)
        starts = [store.start.detach() for block in self.blocks if isinstance(store := block.store, AssociativeStore)]
        none = torch.full((B,), NONE, device=device)
        return State(
            memory=memory,
            cell=torch.zeros_like(memory) if config.memory.updated and config.memory.cell == "lstm" else None,
            store=torch.stack(starts).to(memory.dtype)[:, None].repeat(1, B, 1, 1, 1) if starts else None,
            recent=torch.zeros(len(starts), B, 2 * H, TAPS, d, device=device, dtype=dtype) if starts else None,
            keys=empty,
            values=empty,
            stream=tuple(self.memory.new_zeros(B, 0, D) for _ in self.blocks),
            documents=none[:, None].repeat(1, config.lookback),
            owner=none,
            store_owner=none,
            document=none,
            position=torch.zeros_like(none),
            offset=torch.zeros_like(none),
            filled=0,
        )

    def embed(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Return the token stream's start (B, T, D) for tokens (B, T) at these positions of their documents (B, T).

        Raises:
            ValueError: a position beyond a learned table.
        """
        x = self.embedding(input_ids)
        if self.config.position == "sinusoidal":  # scaled to the sinusoids' size, as in Vaswani et al. (2017)
            return x * self.config.hidden_size**0.5 + sinusoids(position, self.config.hidden_size, x.dtype)
        if self.position is None:
            return x
        if (position >= len(self.position.weight)).any():
            raise ValueError(
                f"a document is longer than the table of learned positions: max_position_embeddings = "
                f"{len(self.position.weight)}; rotary and sinusoidal positions know no limit"
            )
        return x + self.position(position)

    def _view(
        self,
        document_ids: Tensor,
        documents: Tensor,
        owner: Tensor,
        own: Tensor,
        position: Tensor,
        offset: Tensor,
        begins: bool,
        ends: bool,
        filled: int,
    ) -> View:
        """Return who sees whom: `documents` (B, n + T) are those of all tokens remembered or read, `filled` counts the
        segment's with the new ones."""
        m, T = self.config.memory.slots, document_ids.shape[1]
        kept = (document_ids == owner[:, None]) & self.config.memory.updated  # (B, T): whose document wrote the slots
        slots = kept[:, :, None].expand(-1, -1, m)
        seen = document_ids[:, :, None] == documents[:, None, :]  # (B, T, n + T)
        causal = torch.ones(T, documents.shape[1], dtype=torch.bool, device=seen.device)
        causal = causal.tril(documents.shape[1] - T)
        last = document_ids[:, -1:]
        fresh = owner[:, None] != last  # (B, 1)
        closing = [~fresh.expand(-1, m), fresh.expand(-1, m), documents[:, -filled:] == last]
        dtype, head_size = self.memory.dtype, self.config.head_size
        rotary = self.config.position == "rotary"
        return View(
            begins=begins,
            ends=ends,
            token_mask=torch.cat([slots, ~slots, seen & causal], dim=2)[:, None],
            memory_mask=torch.cat(closing, dim=1)[:, None, None],
            fresh=fresh[:, :, None],
            own=own,
            same=seen[:, :, -T:],
            follows=position[:, :, None] > 0,
            by=rotation(offset, head_size, dtype) if rotary else None,
            back=rotation(-offset[:, -1:] - 1, head_size, dtype) if rotary else None,
        )

    def compile_training(self) -> None:
        """Compile the layers for training mode, where all segments have one shape (B, S); others are read as before."""
        self._compiled = [torch.compile(block, dynamic=False) for block in self.blocks]

    def count_parameters(self) -> int:
        """Return the number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory`, each whole."""
        pretrained.save(self, self.config, Path(directory))

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str = "cpu") -> "RMKV":
        """Return the model of a model folder, of a checkpoint, or of a run (its newest whole checkpoint).

        Raises:
            UserError: there is no model, its files do not fit together, or the memory is too small for it.
        """
        folder = pretrained.find_model(Path(directory))
        with torch.device("meta"):
            model = cls(pretrained.read_config(folder))
        pretrained.assign(model, pretrained.read_weights(folder, model, pretrained.CONFIG, device))
        return model.eval()


@contextmanager
def reading(model: RMKV) -> Iterator[None]:
    """Run the model without gradients and without dropout; its training mode is restored at the end."""
    training = model.training
    if training:  # or not, since it takes a while to tell all the modules
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def reset_memory(state: State) -> State:
    """Return the state with its memory forgotten, as before a document's first segment.

    The look-back is kept, and the recent tokens' queries and keys that the store's convolution reads.
    """
    nobody = torch.full_like(state.owner, NONE)
    return replace(state, owner=nobody, store_owner=nobody)


def reset_recent(state: State) -> State:
    """Return the state with its memory kept, slots and store, and what was recent forgotten.

    The tokens that follow see neither the look-back nor the open segment's tokens, and at the segment's end the slots
    take in the new ones alone; the store has taken in all of them. The position is kept.
    """
    recent = None if state.recent is None else torch.zeros_like(state.recent)
    return replace(state, documents=torch.full_like(state.documents, NONE), recent=recent)


def swap_memory(state: State, order: Tensor) -> State:
    """Return the state with each row's memory, its store included, taken from row order[b] of the batch; all else is
    kept."""
    cell, store = (None if x is None else x[:, order] for x in (state.cell, state.store))
    return replace(state, memory=state.memory[:, order], cell=cell, store=store)


def _count(document_ids: Tensor, before: Tensor, counted: Tensor) -> Tensor:
    """Return how many tokens of its own document stand before each token, (B, T).

    `before` (B,) is the document of the token before the first one, `counted` (B,) its tokens so far.
    """
    previous = torch.cat([before[:, None], document_ids[:, :-1]], dim=1)
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    start = torch.where(document_ids != previous, index, NONE).cummax(dim=1).values
    return torch.where(start == NONE, counted[:, None] + index, index - start)
