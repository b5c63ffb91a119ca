"""The model: embeddings, the loop over segments with its carried state, and the head."""

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
from rmkv_cli.model.quantized import Quantized, insert_quantized
from rmkv_cli.model.state import State, contiguous_copy
from rmkv_cli.model.store import AssociativeStore

NONE = -1  # no document


class RMKV(nn.Module):
    """A causal language model that reads text segment by segment and carries a state of fixed size.

    A call over a whole text, calls over its pieces that pass on the state, and calls token by token give the same
    logits. Tokens see neither tokens nor memory of another document.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, layers = config.hidden_size, config.num_hidden_layers
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.position = nn.Embedding(config.max_position_embeddings, D) if config.position == "learned" else None
        self.through_layers = config.memory.carry == "layers"
        # The slots of a document before its first segment ends. They also distinguish the slots from each other.
        self.memory = nn.Parameter(torch.empty(1 if self.through_layers else layers, config.memory.slots, D))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(RMKVBlock(config, index) for index in range(layers))
        self.norm = make_norm(config)
        self.unembedding = None if config.tie_word_embeddings else nn.Linear(D, config.vocab_size, bias=False)
        for table in (self.embedding.weight, self.memory, *([self.position.weight] if self.position else [])):
            nn.init.normal_(table, std=0.02)
        if config.quantization is not None:
            insert_quantized(self, config.quantization)

    def forward(
        self, input_ids: Tensor, state: State | None = None, document_ids: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Read tokens; return logits, (B, T, V), and the state after them.

        Args:
            input_ids: the tokens, (B, T) int64.
            state: the state before them; None: the initial state.
            document_ids: each token's document, (B, T) int64, at least 0 and non-decreasing along a row. The id of the
                state's last document continues that document, as None does.

        Raises:
            ValueError: there are no tokens; document ids are negative or decrease; a position exceeds a learned table;
                or a model that carries its memory through layers would have to continue inside a segment.
        """
        if document_ids is not None:
            before = state.document[:, None] if state else torch.full_like(document_ids[:, :1], NONE)
            if (torch.cat([before, document_ids], dim=1).diff() < 0).any() or (document_ids < 0).any():
                raise ValueError(
                    "document_ids must be at least 0, non-decreasing along a row, and not below the state's"
                )
        hidden, state = self.hidden(input_ids, state, document_ids)
        return self.head(hidden), state

    def hidden(
        self,
        input_ids: Tensor,
        state: State | None = None,
        document_ids: Tensor | None = None,
        read: Callable[..., tuple[Tensor, State]] | None = None,
    ) -> tuple[Tensor, State]:
        """Return the head's input, (B, T, D), and the state after the tokens.

        Args:
            input_ids: as in `forward`, like `state`.
            state: see `forward`.
            document_ids: as in `forward`. Keep them on the CPU: their values are read here, and on a GPU that would
                make the host wait.
            read: a replacement for `segment`, such as one that recomputes activations.
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be (B, T) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
        B, T = input_ids.shape
        if not T:
            raise ValueError("input_ids contains no tokens")
        state = state or self.initial_state(B)
        spans = list(self.spans(T, state.filled))
        if document_ids is None:
            document_ids, mixed = state.document.clamp(min=0)[:, None].expand(B, T), [False] * len(spans)
        else:
            first, last = ([span[i] - i for span in spans] for i in range(2))
            mixed = (document_ids[:, first] != document_ids[:, last]).any(0).tolist()
            document_ids = document_ids.to(input_ids.device, non_blocking=True)
        if not self.training:  # training checks its data in advance
            self._require_positions(document_ids, state)
        outputs = []
        for (start, stop), is_mixed in zip(spans, mixed, strict=True):
            tokens, documents = (contiguous_copy(x[:, start:stop]) for x in (input_ids, document_ids))
            output, state = (read or self.segment)(tokens, state, documents, is_mixed)
            outputs.append(output)
        return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), state

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits, (..., V), for the head's input, (..., D)."""
        layer = self.unembedding or self.embedding
        return layer(hidden) if isinstance(layer, Quantized) else F.linear(hidden, layer.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Type that the token stream is computed in."""
        return self.norm.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, (V, D); the embedding's if they are tied."""
        return (self.unembedding or self.embedding).weight

    def spans(self, length: int, filled: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each segment's part of `length` tokens that follow `filled` tokens of a segment."""
        S = self.config.segment_length
        start = 0
        while start < length:
            stop = min(start + S - (filled + start) % S, length)
            yield start, stop
            start = stop

    def segment(self, input_ids: Tensor, state: State, document_ids: Tensor, mixed: bool) -> tuple[Tensor, State]:
        """Read tokens of one segment, (B, T); return the head's input, (B, T, D), and the state.

        `mixed` states whether some row has tokens of several documents.
        """
        if self.through_layers and state.filled:
            raise ValueError("memory.carry = 'layers' needs whole segments: it cannot continue inside one")
        filled = state.filled + input_ids.shape[1]
        # A memory carried through layers is also needed after a text's last, shorter segment.
        ends_segment = filled == self.config.segment_length or self.through_layers
        position, offset = _positions(document_ids, state)
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
        after = State.from_layers(
            layers,
            memories=len(self.memory),
            documents=documents,
            # Clones, because a compiled segment is compiled again if two of its inputs are the same tensor.
            owner=last.clone() if ends_segment else state.owner,
            store_owner=last.clone(),
            document=last,
            position=position[:, -1] + 1,
            offset=torch.zeros_like(last) if ends_segment else offset[:, -1] + 1,
            filled=filled % self.config.segment_length,
        )
        return self.norm(x), after

    def initial_state(self, batch_size: int) -> State:
        """Return the state of `batch_size` texts before any token."""
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
        """Return the embeddings, (B, T, D), of tokens, (B, T), at positions of their documents, (B, T)."""
        table = self.embedding
        x = table.dequantized(self.dtype, input_ids) if isinstance(table, Quantized) else table(input_ids)
        if self.config.position == "sinusoidal":  # scaled to the sinusoids' size, as in Vaswani et al. (2017)
            return x * self.config.hidden_size**0.5 + sinusoids(position, self.config.hidden_size, x.dtype)
        if self.position is None:
            return x
        return x + self.position(position)

    def _require_positions(self, document_ids: Tensor, state: State) -> None:
        if self.position is not None and (_positions(document_ids, state)[0] >= len(self.position.weight)).any():
            raise ValueError(
                f"a document is longer than the table of learned positions: max_position_embeddings = "
                f"{len(self.position.weight)}; rotary and sinusoidal positions have no limit"
            )

    def count_parameters(self) -> int:
        """Return the number of parameters, including quantized ones; tied ones count once."""
        integers = sum(layer.rows * layer.columns for layer in self.modules() if isinstance(layer, Quantized))
        return integers + sum(p.numel() for p in self.parameters())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors into `directory`, each atomically."""
        pretrained.save(self, self.config, Path(directory))

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> "RMKV":
        """Return the model in a model folder, a checkpoint, or a run (its newest intact checkpoint).

        From an adapter's folder, load the base model with the adapter.

        Args:
            directory: the folder.
            device: the device of the weights.
            dtype: the type to compute in, float32 or bfloat16 (see `rmkv_cli.model.precision`); None: float32, or
                float64 if all weights in the file are.

        Raises:
            UserError: there is no model, its files do not match, or the device's memory is too small.
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
def inference(model: RMKV) -> Iterator[None]:
    """Run the model without gradients and dropout; restore its training mode at the end."""
    training = model.training
    if training:  # skipped otherwise, because setting the mode of every module takes time
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def reset_memory(state: State) -> State:
    """Return the state with its slots and stores reset, as at the start of a document.

    The look-back stays, and so do the recent queries and keys that the store's convolution reads.
    """
    none = torch.full_like(state.owner, NONE)
    return replace(state, owner=none, store_owner=none)


def reset_recent(state: State) -> State:
    """Return the state with its slots and stores, but without the recent tokens.

    The next tokens see neither the look-back nor the open segment, and at the segment's end the slots are updated from
    the new tokens alone. The store has already read every token. The position stays.
    """
    recent = None if state.recent is None else torch.zeros_like(state.recent)
    return replace(state, documents=torch.full_like(state.documents, NONE), recent=recent)


def swap_memory(state: State, order: Tensor) -> State:
    """Return the state in which row b has the slots and stores of row order[b]; everything else stays."""
    cell, store = (None if x is None else x[:, order] for x in (state.cell, state.store))
    return replace(state, memory=state.memory[:, order], cell=cell, store=store)


def _positions(document_ids: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Return each token's position in its document and its offset in the document's part of the segment, (B, T)."""
    previous = torch.cat([state.document[:, None], document_ids[:, :-1]], dim=1)
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    start = torch.where(document_ids != previous, index, NONE).cummax(dim=1).values
    continues, since = start == NONE, index - start
    return (
        torch.where(continues, state.position[:, None] + index, since),
        torch.where(continues, state.offset[:, None] + index, since),
    )
