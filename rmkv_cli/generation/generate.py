"""Reading a prompt into the state, and writing on from there one token at a time."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.generation.sampling import SamplingConfig, sample
from rmkv_cli.generation.stop import StopStrings
from rmkv_cli.model import RMKV, State, reading
from rmkv_cli.tokenizer import Piece, Special, Tokenizer

StopReason = Literal["end", "stop", "length"]
"""The model ended the document; a stop string came; `max_tokens` were written."""

NEVER_WRITTEN = [Special.PAD.id, Special.UNK.id]


@dataclass(frozen=True)
class Prompt:
    """A prompt that has been read. Any number of texts can go on from it."""

    tokens: int
    """Tokens read, a document's opening one included; not those that an earlier reading had read."""
    seconds: float
    """Time it took to read them."""
    logits: Tensor
    """(1, V), of the token that follows."""
    state: State
    seen: Tensor
    """(1, V) bool: which tokens it holds, and what was read before it."""


class Generation:
    """A text being written. Iterating over it writes it and gives its pieces; characters appear whole."""

    def __init__(
        self,
        model: RMKV,
        tokenizer: Tokenizer,
        prompt: Prompt,
        config: SamplingConfig,
        max_tokens: int,
        stop: Sequence[str],
    ) -> None:
        self.state = prompt.state
        """All that was read: the prompt and, of the text, all tokens but the last."""
        self.text = ""
        self.ids: list[int] = []
        """Tokens written, those of a stop string included, an end-of-document token not."""
        self.seconds = 0.0
        """Time it took to write them, without what the reader did between the pieces."""
        self.stop_reason: StopReason | None = None
        self._model, self._tokenizer, self._config, self._max_tokens = model, tokenizer, config, max_tokens
        self._stop = StopStrings(stop)
        self._logits, self._seen = prompt.logits, prompt.seen.clone()
        self._generator = torch.Generator(prompt.logits.device).manual_seed(config.seed)

    def __iter__(self) -> Iterator[str]:
        """Yield the text's pieces as soon as they are certain; what stands before a stop string is the end."""
        stream = self._tokenizer.stream()
        while self.stop_reason is None:
            start = time.perf_counter()
            token = self._write()
            self.seconds += time.perf_counter() - start
            if token == self._tokenizer.eod:
                self.stop_reason = "end"
                break
            self.ids.append(token)
            yield from self._certain(self._stop.push(stream.step(token)))
            if self._stop.found is not None:
                self.stop_reason = "stop"
            elif len(self.ids) == self._max_tokens:
                self.stop_reason = "length"
        if self._stop.found is None:
            yield from self._certain(self._stop.push(stream.end()) + self._stop.end())

    def _certain(self, piece: str) -> Iterator[str]:
        self.text += piece
        if piece:
            yield piece

    @torch.inference_mode()
    def _write(self) -> int:
        """Return the next token, having read the one before."""
        if self.ids:
            last = torch.tensor([self.ids[-1:]], device=self._logits.device)
            self._logits, self.state = _read(self._model, last, self.state)
        logits = self._logits.clone()
        logits[:, NEVER_WRITTEN] = -torch.inf
        logits[:, self._tokenizer.vocab_size :] = -torch.inf  # ids that only pad the model's vocabulary
        token = sample(logits, self._config, self._generator, self._seen)
        self._seen[:, token] = True
        return int(token)


def read_prompt(
    model: RMKV,
    tokenizer: Tokenizer,
    prompt: str | Iterable[Piece],
    after: Prompt | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Prompt:
    """Read the beginning of a document, or what goes on `after` an earlier reading; "" is a document's bare beginning.

    The pieces are taken as they are needed, so a stream of them (see `text_pieces`) may be of any length. `advance` is
    called with the number of tokens just read.

    Raises:
        UserError: the model cannot generate, the tokenizer does not fit it, the text is not valid Unicode or is longer
            than learned positions, or the model's weights give no numbers.
    """
    config = model.config
    if config.memory.carry == "layers":
        raise UserError(
            "this model cannot generate: its memory goes through layers (memory.carry = 'layers'), so it "
            "is not causal: each token is read with what comes after it"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: they are not "
            "of one training"
        )
    start, read = time.perf_counter(), 0
    state, logits = (after.state, after.logits) if after else (None, None)
    device = model.memory.device
    seen = after.seen.clone() if after else torch.zeros(1, config.vocab_size, dtype=torch.bool, device=device)
    pieces = [prompt] if isinstance(prompt, str) else prompt
    begun = [] if after else [tokenizer.eod]
    for ids in _segments(tokenizer, pieces, begun, config.segment_length, state.filled if state else 0):
        _require_positions(model, state, len(ids))
        logits, state = _read(model, torch.tensor([ids], device=device), state)
        seen[:, ids] = True
        read += len(ids)
        advance(len(ids))
    assert state is not None
    assert logits is not None
    if not logits.isfinite().all():
        raise UserError("the model's logits are not numbers: its weights are damaged, or its training diverged")
    return Prompt(read, time.perf_counter() - start, logits, state, seen)


def generate(
    model: RMKV,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Piece] | Prompt,
    config: SamplingConfig,
    max_tokens: int,
    stop: Sequence[str] = (),
) -> Generation:
    """Return the text that goes on from the prompt, yet to be written: iterate over it.

    The same prompt, config and seed give the same text. The state's size does not depend on the text's length.

    Args:
        model: an RMKV; its training mode is left as it is.
        tokenizer: the one that it was trained with.
        prompt: the beginning of a document, or one that `read_prompt` has read.
        config: how tokens are drawn.
        max_tokens: the most that are written.
        stop: strings, before the first of which the text ends.

    Raises:
        UserError: as `read_prompt` does; a wrong `max_tokens`; an empty stop string.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens: should be 1 or more, got {max_tokens}")
    if not isinstance(prompt, Prompt):
        prompt = read_prompt(model, tokenizer, prompt)
    _require_positions(model, prompt.state, max_tokens - 1)
    return Generation(model, tokenizer, prompt, config, max_tokens, stop)


def _read(model: RMKV, input_ids: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Return the logits (1, V) after the last of the tokens (1, T), and the state."""
    with reading(model):
        hidden, state = model.hidden(input_ids, state)
        return model.head(hidden[:, -1]).float(), state


def _segments(
    tokenizer: Tokenizer, pieces: Iterable[Piece], ids: list[int], length: int, filled: int
) -> Iterator[list[int]]:
    """Yield `ids` and those of the pieces, cut where segments of `length` end, `filled` tokens of the first read."""
    room = length - filled
    for piece in pieces:
        ids += (piece.id,) if isinstance(piece, Special) else tokenizer.encode(piece)
        start = 0
        while len(ids) - start >= room:
            yield ids[start : start + room]
            start, room = start + room, length
        ids = ids[start:]
    if ids:
        yield ids


def _require_positions(model: RMKV, state: State | None, tokens: int) -> None:
    """Raise `UserError` if so many more tokens pass the end of learned positions."""
    read, known = int(state.position.max()) if state else 0, model.config.max_position_embeddings
    if model.config.position == "learned" and read + tokens > known:
        raise UserError(
            f"prompt and text are longer than the model's learned positions, {known} tokens (max_position_embeddings)"
        )
