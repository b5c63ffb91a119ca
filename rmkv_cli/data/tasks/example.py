"""An example of a task, and the noise within it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import CONTINUED, Tokenizer

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """A document of a task."""

    tokens: Integers
    """Tokens of the document (length,), without the one that begins it."""
    answers: list[tuple[int, int]]
    """Spans (start, stop) of `tokens`, in order, that must be predicted from everything before them."""


class Haystack(Protocol):
    """Endless noise."""

    @property
    def place(self) -> Any:
        """Place in the noise as plain values; None if the noise has no places."""

    def take(self, rng: np.random.Generator, n: int) -> Integers:
        """Return `n` tokens (n,)."""


@dataclass(frozen=True)
class RandomHaystack:
    """Independent, uniformly random tokens."""

    first: int
    """First id of the tokens."""
    count: int
    """Number of ids; the last one is `first + count - 1`."""
    place: None = None

    def take(self, rng: np.random.Generator, n: int) -> Integers:
        """Return `n` tokens (n,) that `rng` draws."""
        return rng.integers(self.first, self.first + self.count, n)


class TextHaystack:
    """The text of consecutive documents, without the tokens that begin them."""

    def __init__(self, read: Callable[[Any], Iterator[tuple[Any, NDArray[Any]]]], place: Any = None) -> None:
        """Start at `place`; `read` yields endless documents from a place on, each with the place before it."""
        self._before: Any
        self._offset: int
        self._before, self._offset = place or (None, 0)
        self._documents = read(self._before)
        self._document: NDArray[Any] = np.empty(0, np.int64)
        if self._offset:
            self._before, self._document = next(self._documents)

    @property
    def place(self) -> Any:
        """Place in the text: a document's place, and the number of its tokens already taken."""
        return self._before, self._offset

    def take(self, rng: np.random.Generator, n: int) -> Integers:
        """Return the next `n` tokens (n,); raise `UserError` if all documents are empty."""
        parts = [np.empty(0, np.int64)]
        while n:
            if self._offset == len(self._document):
                (self._before, self._document), self._offset = next(self._documents), 0
            part = self._document[self._offset : self._offset + n]
            parts.append(part.astype(np.int64))
            self._offset += len(part)
            n -= len(part)
        return np.concatenate(parts)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, encoded separately so that a text has the same tokens everywhere."""
    return tokenizer.encode_documents([[CONTINUED, text] for text in texts])


def scatter(noise: Integers, parts: Sequence[Sequence[int]], places: Integers) -> Integers:
    """Return the noise with each part inserted before the token at its place; parts at one place keep their order."""
    return np.insert(noise, np.repeat(places, [len(part) for part in parts]), np.concatenate(parts))


def cycle_documents(
    documents: Sequence[NDArray[Any]], begin: int = 1
) -> Callable[[Any], Iterator[tuple[Any, NDArray[Any]]]]:
    """Return a function that reads documents endlessly, without their first `begin` tokens.

    A place is the number of documents read before it.
    """

    def read(place: Any) -> Iterator[tuple[Any, NDArray[Any]]]:
        if not any(len(document) > begin for document in documents):
            raise UserError("the documents contain no text for a task's noise")
        for number in count(place or 0):
            document = documents[number % len(documents)][begin:]
            if len(document):
                yield number, document

    return read
