"""Pack documents into rows, in lanes: without cropping or padding, and exactly resumable."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError

Int64 = npt.NDArray[np.int64]
IGNORED = -100
"""The target that torch's cross_entropy ignores by default."""


@dataclass(frozen=True)
class Rows:
    """One row of each lane; all arrays are (lanes, length)."""

    input_ids: Int64
    targets: Int64
    """Next token of the same document, or end-of-document after the last one; -100 if it does not count in the loss."""
    document_ids: Int64
    """Number of the document within its lane, from 0; a document that continues in the next row keeps its number."""


class EndOfData(Exception):  # noqa: N818 - not an error
    """A mix ended as configured; the message says why."""


class Document(Protocol):
    """A document as a lane reads it."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def part(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return the tokens from `start` to `stop` or to the document's end, whichever comes first."""

    def counted(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Return which targets from `start` to `stop` count in the loss, or None if all do."""

    def rest(self, offset: int) -> dict[str, Any]:
        """Return the data from which `Queue.reopen` restores the document from token `offset` on."""


@dataclass(frozen=True)
class InMemory:
    """A document in memory."""

    tokens: npt.NDArray[Any]
    counts: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, stop: int) -> npt.NDArray[Any]:
        """See `Document`."""
        return self.tokens[start:stop]

    def counted(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """See `Document`."""
        return None if self.counts is None else self.counts[start:stop]

    def rest(self, offset: int) -> dict[str, Any]:
        """Return the remaining tokens as tensors, which are compact in a checkpoint and safe to load."""
        import torch

        # The signed type of the same size, because torch pickles no unsigned one.
        tokens = torch.from_numpy(
            self.tokens[offset:].astype(f"u{self.tokens.itemsize}").view(f"i{self.tokens.itemsize}")
        )
        return {
            "tokens": tokens,
            "counts": None if self.counts is None else torch.from_numpy(self.counts[offset:].copy()),
        }

    @classmethod
    def reopened(cls, rest: dict[str, Any]) -> "InMemory":
        """Restore a document from the result of `rest`."""
        tokens = np.asarray(rest["tokens"])
        counts = None if rest["counts"] is None else np.asarray(rest["counts"], np.bool_)
        return cls(tokens.view(f"u{tokens.itemsize}"), counts)


class Stored:
    """A document of a prepared mix; only requested tokens are read."""

    def __init__(self, documents: Documents, index: int) -> None:
        self._documents, self._index = documents, index
        self._counts = documents.counted(index)

    def __len__(self) -> int:
        return int(self._documents.lengths[self._index])

    def part(self, start: int, stop: int) -> npt.NDArray[Any]:
        """See `Document`."""
        return self._documents.part(self._index, start, stop)

    def counted(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """See `Document`."""
        return None if self._counts is None else self._counts[start:stop]

    def rest(self, offset: int) -> dict[str, Any]:
        """Return the document's index and the offset, without its tokens."""
        return {"document": self._index, "offset": offset}


class Queue(Protocol):
    """A queue of documents, usually endless."""

    def next(self) -> Document:
        """Return the next document.

        Raises:
            EndOfData: the queue is exhausted.
        """

    def reopen(self, rest: dict[str, Any]) -> tuple[Document, int]:
        """Return the document that `rest` describes, and the offset of its next token."""

    def bookmark(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the state of this moment, for `load_state_dict`.

        The function may be called after the queue has advanced. A bookmark is cheap; computing its state may not be.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""


class Prepared:
    """The documents of a prepared mix: first in the mix's order, then endlessly in random orders.

    Args:
        documents: the documents in the mix's order.
        seed: the seed of the random orders.
    """

    def __init__(self, documents: Documents, seed: int) -> None:
        self._documents, self._seed = documents, seed
        self._epoch = self._cursor = 0
        self._order = self._permutation()

    def _permutation(self) -> Int64:
        order = np.arange(len(self._documents))
        return np.random.default_rng([self._seed, self._epoch]).permutation(order) if self._epoch else order

    def next(self) -> Stored:
        """Return the next document (see `Queue`)."""
        if self._cursor == len(self._order):
            self._epoch += 1
            self._cursor = 0
            self._order = self._permutation()
        self._cursor += 1
        return Stored(self._documents, int(self._order[self._cursor - 1]))

    def reopen(self, rest: dict[str, Any]) -> tuple[Document, int]:
        """Return a document and the offset of its next token (see `Queue`)."""
        if "document" not in rest:  # checkpoints of earlier versions contain the tokens themselves
            return InMemory.reopened(rest), 0
        return Stored(self._documents, rest["document"]), rest["offset"]

    def bookmark(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns this place as plain values (see `Queue`)."""
        state = {"documents": len(self._documents), "seed": self._seed}
        state |= {"epoch": self._epoch, "cursor": self._cursor}
        return lambda: state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; raise `UserError` if it is that of other documents or another seed."""
        for key, here in (("documents", len(self._documents)), ("seed", self._seed)):
            _require_equal(key, state[key], here)
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()


@dataclass
class _Lane:
    """The position of a lane in its document."""

    document: Document
    offset: int = 0
    """Number of the document's tokens that the lane has read."""
    number: int = -1
    """Number of the document within the lane."""


class Lanes:
    """Endless streams of documents, one per lane. A lane takes its next document from a shared queue."""

    def __init__(self, queue: Queue, lanes: int, eod: int) -> None:
        self._queue, self._eod = queue, eod
        self._lanes = [_Lane(InMemory(np.empty(0, np.int64))) for _ in range(lanes)]

    def next(self, length: int) -> Rows:
        """Return the next `length` tokens of every lane; raise `EndOfData` if the queue is exhausted."""
        shape = (len(self._lanes), length)
        rows = Rows(*(np.empty(shape, np.int64) for _ in range(3)))
        for number, lane in enumerate(self._lanes):
            self._fill(lane, rows.input_ids[number], rows.targets[number], rows.document_ids[number])
        return rows

    def _fill(self, lane: _Lane, input_ids: Int64, targets: Int64, document_ids: Int64) -> None:
        at = 0
        while at < len(input_ids):
            if lane.offset == len(lane.document):
                lane.document, lane.offset = self._queue.next(), 0
                lane.number += 1
            start = lane.offset
            step = min(len(lane.document) - start, len(input_ids) - at)
            end, lane.offset = at + step, start + step
            tokens = lane.document.part(start, start + step + 1)
            input_ids[at:end] = tokens[:step]
            document_ids[at:end] = lane.number
            targets[at : at + len(tokens) - 1] = tokens[1:]
            targets[at + len(tokens) - 1 : end] = self._eod
            if (counted := lane.document.counted(start, start + step)) is not None:
                targets[at:end][~counted] = IGNORED
            at = end

    def bookmark(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns this moment's state (see `Queue`), with the rests of the open documents."""
        queue, lanes = self._queue.bookmark(), [replace(lane) for lane in self._lanes]
        return lambda: {
            "queue": queue(),
            "lanes": [lane.document.rest(lane.offset) | {"number": lane.number} for lane in lanes],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`."""
        return self.bookmark()()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            UserError: the state has another number of lanes, or belongs to another queue.
        """
        _require_equal("lanes", len(state["lanes"]), len(self._lanes))
        self._queue.load_state_dict(state["queue"])
        self._lanes = [_Lane(*self._queue.reopen(rest), rest["number"]) for rest in map(_upgraded, state["lanes"])]


def _upgraded(lane: Any) -> dict[str, Any]:
    """Return a lane's state in the form of `Lanes.state_dict`; earlier versions stored lists of numbers."""
    return dict(zip(("tokens", "counts", "number"), lane, strict=True)) if isinstance(lane, list) else lane


def _require_equal(key: str, there: int, here: int) -> None:
    if there != here:
        raise UserError(f"cannot resume the data: the checkpoint has {key} = {there}, this run {here}")
