"""Prefill: read prompts into states, one segment at a time."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.model import RMKV, State, inference
from rmkv_cli.tokenizer import Piece, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt that has been read. Any number of texts can continue it."""

    tokens: int
    """Number of tokens read, including the one that opens a document but not those of an earlier reading."""
    seconds: float
    """Time spent reading them."""
    logits: Tensor
    """(1, V) logits of the next token."""
    state: State
    seen: Tensor
    """(1, V) bool: tokens that occur in the prompt or in earlier readings."""


def read_prompt(
    model: RMKV,
    tokenizer: Tokenizer,
    prompt: str | Iterable[Piece],
    after: Prompt | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Prompt:
    """Read the beginning of a document, or the text `after` an earlier reading; "" is a document's bare beginning.

    Pieces are consumed as needed, so a stream of them (see `text_pieces`) may have any length. `advance` is
    called with the number of tokens just read.

    Raises:
        UserError: the model cannot generate, the tokenizer does not fit it, the text is not valid Unicode or exceeds
            the learned positions, or the model's logits are not finite.
    """
    reading = read_by_segments(model, tokenizer, prompt, after, advance)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            read: Prompt = end.value
            return read


def read_by_segments(
    model: RMKV,
    tokenizer: Tokenizer,
    prompt: str | Iterable[Piece],
    after: Prompt | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Generator[None, None, Prompt]:
    """Read as `read_prompt` does, but yield after each segment; return the reading.

    The caller's time between segments does not count.
    """
    require_fit(model, tokenizer)
    config = model.config
    seconds, read = 0.0, 0
    state, logits = (after.state, after.logits) if after else (None, None)
    device = model.memory.device
    seen = after.seen.clone() if after else torch.zeros(1, config.vocab_size, dtype=torch.bool, device=device)
    pieces = [prompt] if isinstance(prompt, str) else prompt
    start = time.perf_counter()
    found = tokenizer.encode_stream(pieces, after=after is not None)
    for ids in _segments(found, config.segment_length, state.filled if state else 0):
        require_positions(model, state, len(ids))
        logits, state = _read(model, torch.tensor([ids], device=device), state)
        seen[:, ids] = True
        read += len(ids)
        seconds += time.perf_counter() - start
        advance(len(ids))
        yield
        start = time.perf_counter()
    assert state is not None
    assert logits is not None
    _require_finite(logits)
    return Prompt(read, seconds + time.perf_counter() - start, logits, state, seen)


def read_tokens(model: RMKV, ids: Sequence[int], after: Prompt | None = None) -> Prompt:
    """Read one or more tokens at a document's beginning or `after` an earlier reading; errors as in `read_prompt`.

    Tokens that were drawn can differ from those that their text encodes to.
    """
    start = time.perf_counter()
    earlier, device = after.state if after else None, model.memory.device
    require_positions(model, earlier, len(ids))
    logits, state = _read(model, torch.tensor([ids], device=device), earlier)
    _require_finite(logits)
    seen = after.seen.clone() if after else torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=device)
    seen[:, ids] = True
    return Prompt(len(ids), time.perf_counter() - start, logits, state, seen)


def read_prompts(model: RMKV, tokenizer: Tokenizer, prompts: Sequence[Sequence[Piece]]) -> list[Prompt]:
    """Read the beginnings of documents in batches; each reading equals that of `read_prompt`.

    Whole segments are batched first, then remainders of equal length. A prompt's `seconds` are its share, by tokens,
    of the total time. A prompt with logits that are not finite does not stop the others; the text after it ends with
    that error.

    Raises:
        UserError: errors of `read_prompt`, except for the logits.
    """
    require_fit(model, tokenizer)
    start, S, device = time.perf_counter(), model.config.segment_length, model.memory.device
    documents = tokenizer.encode_documents(prompts)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]), reverse=True)
    ids = [documents[i] for i in order]  # longest first, so that the prompts with further segments are the first rows
    state = model.initial_state(len(ids))
    states, logits = [state.rows(i, 1) for i in range(len(ids))], [torch.empty(0)] * len(ids)

    def read(part: slice, rows: list[int], state: State) -> State:
        require_positions(model, state, len(ids[rows[0]][part]))
        found, state = _read(model, torch.tensor([ids[i][part] for i in rows], device=device), state)
        for row, i in enumerate(rows):
            logits[i], states[i] = found[row : row + 1], state.rows(row, 1)
        return state

    for at in range(S, len(ids[0]) + 1 if ids else 0, S):
        rows = [i for i, document in enumerate(ids) if len(document) >= at]
        state = read(slice(at - S, at), rows, state.rows(0, len(rows)))
    for rest in {len(document) % S for document in ids} - {0}:
        rows = [i for i, document in enumerate(ids) if len(document) % S == rest]
        read(slice(-rest, None), rows, State.join([states[i] for i in rows]))
    seconds_per_token = (time.perf_counter() - start) / max(sum(map(len, ids)), 1)
    prompts_read = {}
    for place, document, after, follows in zip(order, ids, states, logits, strict=True):
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=device)
        seen[:, document] = True
        prompts_read[place] = Prompt(len(document), seconds_per_token * len(document), follows, after, seen)
    return [prompts_read[place] for place in range(len(ids))]


def _read(model: RMKV, input_ids: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Return the logits (B, V) after the last of the tokens (B, T), and the state."""
    with inference(model):
        hidden, state = model.hidden(input_ids, state)
        return model.head(hidden[:, -1]).float(), state


def _segments(found: Iterable[list[int]], length: int, filled: int) -> Iterator[list[int]]:
    """Yield the ids, split at the ends of segments of `length` tokens; the first already contains `filled` tokens."""
    room = length - filled
    ids: list[int] = []
    for more in found:
        ids += more
        start = 0
        while len(ids) - start >= room:
            yield ids[start : start + room]
            start, room = start + room, length
        ids = ids[start:]
    if ids:
        yield ids


def require_fit(model: RMKV, tokenizer: Tokenizer) -> None:
    """Raise `UserError` if the model cannot generate with this tokenizer."""
    if model.config.memory.carry == "layers":
        raise UserError(
            "this model cannot generate: memory.carry = 'layers' is not causal, so tokens see later tokens; use a "
            "model that was trained with memory.carry = 'segments'"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; use the "
            "tokenizer.json that the model was trained with"
        )


class NonFiniteError(UserError):
    """Logits are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not numbers: its weights are damaged, or its training diverged")


def _require_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise NonFiniteError


def require_positions(model: RMKV, state: State | None, tokens: int) -> None:
    """Raise `UserError` if that many more tokens exceed the learned positions."""
    read, known = int(state.position.max()) if state else 0, model.config.max_position_embeddings
    if model.config.position == "learned" and read + tokens > known:
        raise UserError(
            f"the prompt and the generated text exceed the model's {known} learned positions "
            "(max_position_embeddings); shorten the prompt or generate fewer tokens"
        )
