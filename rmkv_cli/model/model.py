"""The model: embeddings, the segment loop with its carried state, and the head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model import adapter_file, pretrained
from rmkv_cli.model.block import RMKVBlock
from rmkv_cli.model.context import TAPS, SegmentContext, make_context
from rmkv_cli.model.norm import make_norm
from rmkv_cli.model.positions import sinusoids
from rmkv_cli.model.precision import widen
from rmkv_cli.model.quantized import Quantized, put_in
from rmkv_cli.model.state import State, contiguous_copy
from rmkv_cli.model.store import AssociativeStore

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
        self.norm = make_norm(config)
        self.unembedding = None if config.tie_word_embeddings else nn.Linear(D, config.vocab_size, bias=False)
        for table in (self.embedding.weight, self.memory, *([self.position.weight] if self.position else [])):
            nn.init.normal_(table, std=0.02)
        if config.quantization is not None:
            put_in(self, config.quantization)

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
        self,
        input_ids: Tensor,
        state: State | None = None,
        document_ids: Tensor | None = None,
        read: Callable[..., tuple[Tensor, State]] | None = None,
    ) -> tuple[Tensor, State]:
        """Return what the head reads, (B, T, D), and the state; arguments as in `forward`.

        `read` takes the place of `segment`. Whether a segment holds a document's border is looked up in document_ids:
        if they are on the CPU, a GPU need not be waited for.
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids should be (B, T) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
        B, T = input_ids.shape
        if not T:
            raise ValueError("input_ids holds no tokens")
        state = state or self.initial_state(B)
        spans = list(self.spans(T, state.filled))
        if document_ids is None:
            document_ids, mixed = state.document.clamp(min=0)[:, None].expand(B, T), [False] * len(spans)
        else:
            first, last = ([span[i] - i for span in spans] for i in range(2))
            mixed = (document_ids[:, first] != document_ids[:, last]).any(0).tolist()
            document_ids = document_ids.to(input_ids.device, non_blocking=True)
        if not self.training:  # the data of a training are looked through before
            self._require_positions(document_ids, state)
        outputs = []
        for (start, stop), several in zip(spans, mixed, strict=True):
            tokens, documents = (contiguous_copy(x[:, start:stop]) for x in (input_ids, document_ids))
            output, state = (read or self.segment)(tokens, state, documents, several)
            outputs.append(output)
        return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), state

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) for hidden (..., D)."""
        layer = self.unembedding or self.embedding
        return layer(hidden) if isinstance(layer, Quantized) else F.linear(hidden, layer.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the token stream is computed in."""
        return self.norm.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding's own where they are tied."""
        return (self.unembedding or self.embedding).weight

    def spans(self, length: int, filled: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each segment's part of `length` tokens, when `filled` tokens of one are read."""
        S = self.config.segment_length
        start = 0
        while start < length:
            stop = min(start + S - (filled + start) % S, length)
            yield start, stop
            start = stop

    def segment(self, input_ids: Tensor, state: State, document_ids: Tensor, mixed: bool) -> tuple[Tensor, State]:
        """Read tokens (B, T) that lie within one segment; return what the head reads, (B, T, D), and the state.

        `mixed` means that some row has tokens of several documents.
        """
        if self.through_layers and state.filled:
            raise ValueError("memory.carry = 'layers' reads whole segments: it cannot go on inside one")
        filled = state.filled + input_ids.shape[1]
        # A memory carried through layers is also needed after a text's last, shorter segment.
        ends_segment = filled == self.config.segment_length or self.through_layers
        position, offset = _counts(document_ids, state)
        documents = torch.cat([state.documents, document_ids], dim=1)
        last = contiguous_copy(document_ids[:, -1])
        x = self.dropout(self.embed(input_ids, position))

        def context_for(owner: Tensor) -> SegmentContext:
            known = documents, owner, state.store_owner, position, offset, filled
            return make_context(self.config, x.dtype, document_ids, *known, ends_segment=ends_segment, mixed=mixed)

        layers = list(state.layers())
        context, initial = context_for(state.owner), self.memory.unbind()
        for i, block in enumerate(self.blocks):
            if self.through_layers and i == 1:  # the first layer has written the memory, for the last document
                context = context_for(last)
            if self.through_layers and i:
                layers[i] = replace(layers[i], memory=layers[i - 1].memory, cell=layers[i - 1].cell)
            x, layers[i] = block(x, initial[0 if self.through_layers else i], layers[i], context)
        if self.through_layers:
            layers[0] = replace(layers[0], memory=layers[-1].memory, cell=layers[-1].cell)

        if ends_segment:
            documents = contiguous_copy(documents[:, documents.shape[1] - self.config.lookback :])
        after = State.of_layers(
            layers,
            memories=len(self.memory),
            documents=contiguous_copy(documents[:, documents.shape[1] - self.config.lookback :])
            if ends_segment
            else documents,
            # Each a tensor of its own, since a compiled segment is compiled anew where two are one.
            owner=last.clone() if ends_segment else state.owner,
            store_owner=last.clone(),
            document=last,
            position=position[:, -1] + 1,
            offset=torch.zeros_like(last) if ends_segment else offset[:, -1] + 1,
            filled=filled % self.config.segment_length,
        )
        return self.norm(x), after

    def initial_state(self, batch_size: int) -> State:
        """Return the state before any token, for `batch_size` texts."""
        config, device, dtype = self.config, self.memory.device, self.dtype
        B, D, H, G = batch_size, config.hidden_size, config.num_attention_heads, config.key_value_heads
        d = config.head_width
        empty = tuple(torch.zeros(B, G, config.lookback, d, device=device, dtype=dtype) for _ in self.blocks)
        memory = widen(self.memory.detach())[:, None].repeat(1, B, 1, 1)
        starts = [store.start.detach() for block in self.blocks if isinstance(store := block.store, AssociativeStore)]
        none = torch.full((B,), NONE, device=device)
        return State(
            memory=memory,
            cell=torch.zeros_like(memory) if config.memory.updated and config.memory.cell == "lstm" else None,
            store=torch.stack(starts).to(memory.dtype)[:, None].repeat(1, B, 1, 1, 1) if starts else None,
            recent=torch.zeros(len(starts), B, H + G, TAPS, d, device=device, dtype=dtype) if starts else None,
            keys=empty,
            values=empty,
            stream=tuple(torch.zeros(B, 0, D, device=device, dtype=dtype) for _ in self.blocks),
            documents=none[:, None].repeat(1, config.lookback),
            owner=none,
            store_owner=none,
            document=none,
            position=torch.zeros_like(none),
            offset=torch.zeros_like(none),
            filled=0,
        )

    def embed(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Return the token stream's start (B, T, D) for tokens (B, T) at these positions of their documents (B, T)."""
        table = self.embedding
        x = table.dequantized(self.dtype, input_ids) if isinstance(table, Quantized) else table(input_ids)
        if self.config.position == "sinusoidal":  # scaled to the sinusoids' size, as in Vaswani et al. (2017)
            return x * self.config.hidden_size**0.5 + sinusoids(position, self.config.hidden_size, x.dtype)
        if self.position is None:
            return x
        return x + self.position(position)

    def _require_positions(self, document_ids: Tensor, state: State) -> None:
        if self.position is not None and (_counts(document_ids, state)[0] >= len(self.position.weight)).any():
            raise ValueError(
                f"a document is longer than the table of learned positions: max_position_embeddings = "
                f"{len(self.position.weight)}; rotary and sinusoidal positions know no limit"
            )

    def count_parameters(self) -> int:
        """Return the number of parameters, quantized ones included; tied ones count once."""
        integers = sum(layer.rows * layer.columns for layer in self.modules() if isinstance(layer, Quantized))
        return integers + sum(p.numel() for p in self.parameters())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory`, each whole."""
        pretrained.save(self, self.config, Path(directory))

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> "RMKV":
        """Return the model of a model folder, of a checkpoint, or of a run (its newest whole checkpoint).

        A folder that holds an adapter gives its base model with the adapter.

        It computes in `dtype`, float32 or bfloat16: see `rmkv_cli.model.precision`. None means float32, or float64 if
        all weights in the file are.

        Raises:
            UserError: there is no model, its files do not fit together, or the memory is too small for it.
        """
        folder = pretrained.find_model(Path(directory))
        adapter = folder if adapter_file.is_adapter(folder) else None
        if adapter:
            folder = adapter_file.find_base(adapter)
        with torch.device("meta"):
            model = cls(pretrained.read_config(folder))
        pretrained.assign(model, pretrained.read_weights(folder, model, pretrained.CONFIG, device, dtype=dtype))
        if adapter:
            adapter_file.load_adapter(model, adapter)
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


def _counts(document_ids: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Return how many tokens of its own document stand before each token, of all and of its segment, both (B, T)."""
    previous = torch.cat([state.document[:, None], document_ids[:, :-1]], dim=1)
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    start = torch.where(document_ids != previous, index, NONE).cummax(dim=1).values
    goes_on, since = start == NONE, index - start
    return (
        torch.where(goes_on, state.position[:, None] + index, since),
        torch.where(goes_on, state.offset[:, None] + index, since),
    )
