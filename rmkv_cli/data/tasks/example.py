"""One example of a task, and the noise that is in it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Tokenizer

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """A document of a task."""

    tokens: Integers
    """(length,): what follows the end-of-document token that every document begins with."""
    answers: list[tuple[int, int]]
    """Spans (start, stop) of `tokens` in their order: what must be predicted from all that stands before it."""


class Haystack(Protocol):
    """Endless noise."""

    def take(self, rng: np.random.Generator, n: int) -> Integers:
        """Return `n` tokens (n,)."""


@dataclass(frozen=True)
class RandomHaystack:
    """Independent, uniformly random tokens."""

    first: int
    count: int
    """The tokens are `first` to `first + count - 1`."""

    def take(self, rng: np.random.Generator, n: int) -> Integers:
        """Return `n` tokens (n,) that `rng` draws."""
        return rng.integers(self.first, self.first + self.count, n)


class TextHaystack:
    """The text of documents, one after the other without their end-of-document tokens, and over and over again."""

    def __init__(self, documents: Iterable[NDArray[Any]]) -> None:
        self._documents = _endless(documents)
        self._rest: NDArray[Any] = np.empty(0, np.int64)

    def take(self, rng: np.random.Generator, n: int) -> Integers:
        """Return the next `n` tokens (n,); raise `UserError` if no document has any."""
        parts = [np.empty(0, np.int64)]
        while n:
            if not len(self._rest):
                self._rest = next(self._documents)
            part, self._rest = self._rest[:n], self._rest[n:]
            parts.append(part.astype(np.int64))
            n -= len(part)
        return np.concatenate(parts)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text by itself, so that a text is the same tokens wherever it stands."""
    return [ids[1:] for ids in tokenizer.encode_documents([[text] for text in texts])]


def scatter(noise: Integers, parts: Sequence[Sequence[int]], places: Integers) -> Integers:
    """Return the noise with each part in front of its token number `places`; parts at one place keep their order."""
    return np.insert(noise, np.repeat(places, [len(part) for part in parts]), np.concatenate(parts))


def _endless(documents: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    while True:
        empty = True
        for document in documents:
            if len(document) > 1:
                empty = False
                yield document[1:]
        if empty:
            raise UserError("there is no text that a task's noise could be taken from")
