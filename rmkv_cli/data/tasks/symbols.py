"""Tasks on tokens that mean nothing: recall, copy and reverse."""

from dataclasses import dataclass

import numpy as np

from rmkv_cli.config import CopySource, RecallSource, ReverseSource
from rmkv_cli.data.tasks.example import Example, Haystack

SymbolSource = RecallSource | CopySource | ReverseSource


@dataclass(frozen=True)
class Alphabet:
    """Which ids a task's tokens are."""

    symbols: int
    """First id of the keys, which the values follow, or of the tokens to copy."""
    noise: int
    """First id of the noise, where it is not text."""
    marker: int
    """The id after which the answers come."""
    size: int
    """How many ids these are in all."""


def alphabet(task: SymbolSource, ids: range) -> Alphabet:
    """Return the `text_ids` that a task uses: a tokenizer's first ones, or its last ones if the noise is text."""
    symbols = task.keys + task.values if isinstance(task, RecallSource) else task.alphabet
    size = symbols + (0 if task.text else task.noise) + 1
    first = ids.stop - size if task.text else ids.start
    return Alphabet(first, first + symbols, first + size - 1, size)


def recall(
    task: RecallSource, text_ids: range, noise: Haystack, rng: np.random.Generator, pairs: int, segments: int
) -> Example:
    """Return so many key-value pairs, segments of noise, the marker, and keys with their values, the answers."""
    ids = alphabet(task, text_ids)
    keys = ids.symbols + rng.choice(task.keys, pairs, replace=False)
    values = ids.symbols + task.keys + rng.integers(task.values, size=(task.rounds, pairs))
    told = np.empty((task.rounds, pairs, 2), np.int64)
    for row, its_values in zip(told, values, strict=True):
        order = rng.permutation(pairs)
        row[:, 0], row[:, 1] = keys[order], its_values[order]
    S = task.segment_length
    # The middle pair's value is token 2 + before + 2 * middle of the document, whose token 0 ends the one before.
    before = -(2 + 2 * (task.rounds * pairs // 2)) % S if task.straddle else 0
    asked = rng.permutation(pairs)[: task.queries]
    recalled = np.stack([keys[asked], values[-1, asked]], axis=1)
    start = before + told.size + segments * S
    parts = (noise.take(rng, before), told.ravel(), noise.take(rng, segments * S), [ids.marker], recalled.ravel())
    return Example(np.concatenate(parts), [(i, i + 1) for i in range(start + 2, start + 2 + 2 * len(asked), 2)])


def copy(
    task: CopySource | ReverseSource,
    text_ids: range,
    noise: Haystack,
    rng: np.random.Generator,
    length: int,
    segments: int,
) -> Example:
    """Return so many tokens, segments of noise, the marker, and the tokens again or reversed, each one an answer."""
    ids = alphabet(task, text_ids)
    told = rng.integers(ids.symbols, ids.symbols + task.alphabet, length)
    again = np.tile(told[::-1] if task.kind == "reverse" else told, task.repeats)
    tokens = np.concatenate([told, noise.take(rng, segments * task.segment_length), [ids.marker], again])
    return Example(tokens, [(i, i + 1) for i in range(len(tokens) - len(again), len(tokens))])
