"""Tasks on arbitrary symbols: recall, copy and reverse."""

from dataclasses import dataclass

import numpy as np

from rmkv_cli.config import CopySource, RecallSource, ReverseSource
from rmkv_cli.data.tasks.example import Example, Haystack

SymbolSource = RecallSource | CopySource | ReverseSource


@dataclass(frozen=True)
class Alphabet:
    """Ids of a task's tokens."""

    symbols: int
    """First id of the keys, which the values follow, or of the tokens to copy."""
    noise: int
    """First id of the noise, unless it is text."""
    marker: int
    """The id that precedes the answers."""
    size: int
    """Number of all these ids."""


def alphabet(task: SymbolSource, ids: range) -> Alphabet:
    """Return the `text_ids` that a task uses: a tokenizer's first ones, or its last ones if the noise is text."""
    symbols = task.keys + task.values if isinstance(task, RecallSource) else task.alphabet
    size = symbols + (0 if task.text else task.noise) + 1
    first = ids.stop - size if task.text else ids.start
    return Alphabet(first, first + symbols, first + size - 1, size)


def recall(
    task: RecallSource, text_ids: range, noise: Haystack, rng: np.random.Generator, pairs: int, segments: int
) -> Example:
    """Return an example: key-value pairs, segments of noise, the marker, and keys with their values, the answers."""
    ids = alphabet(task, text_ids)
    keys = ids.symbols + rng.choice(task.keys, pairs, replace=False)
    values = ids.symbols + task.keys + rng.integers(task.values, size=(task.rounds, pairs))
    shown = np.empty((task.rounds, pairs, 2), np.int64)
    for round_pairs, round_values in zip(shown, values, strict=True):
        order = rng.permutation(pairs)
        round_pairs[:, 0], round_pairs[:, 1] = keys[order], round_values[order]
    S = task.segment_length
    # The document's token 0 is the end-of-document token, so the middle pair's value is its token
    # 2 + before + 2 * middle. With `straddle`, that token begins a segment, and its key ends the one before.
    before = -(2 + 2 * (task.rounds * pairs // 2)) % S if task.straddle else 0
    asked = rng.permutation(pairs)[: task.queries]
    recalled = np.stack([keys[asked], values[-1, asked]], axis=1)
    start = before + shown.size + segments * S
    parts = (noise.take(rng, before), shown.ravel(), noise.take(rng, segments * S), [ids.marker], recalled.ravel())
    return Example(np.concatenate(parts), [(i, i + 1) for i in range(start + 2, start + 2 + 2 * len(asked), 2)])


def copy(
    task: CopySource | ReverseSource,
    text_ids: range,
    noise: Haystack,
    rng: np.random.Generator,
    length: int,
    segments: int,
) -> Example:
    """Return an example: tokens, segments of noise, the marker, and the same tokens or their reverse as answers.

    There are `length` tokens. The answers occur `task.repeats` times.
    """
    ids = alphabet(task, text_ids)
    shown = rng.integers(ids.symbols, ids.symbols + task.alphabet, length)
    answer = np.tile(shown[::-1] if task.kind == "reverse" else shown, task.repeats)
    tokens = np.concatenate([shown, noise.take(rng, segments * task.segment_length), [ids.marker], answer])
    return Example(tokens, [(i, i + 1) for i in range(len(tokens) - len(answer), len(tokens))])
