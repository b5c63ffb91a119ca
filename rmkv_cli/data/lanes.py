"""Rows of packed documents, in lanes: nothing cropped, nothing padded, exactly resumable."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError

Int64 = npt.NDArray[np.int64]
IGNORED = -100  # what torch's cross_entropy leaves out by default


@dataclass(frozen=True)
class Rows:
    """One row of each lane; all arrays are (lanes, length)."""

    input_ids: Int64
    targets: Int64
    """The next token of the same document, and after its last token the end of the document; -100 where it does not
    count in the loss."""
    document_ids: Int64
    """A number for each document of a lane, counted from 0; one that goes on in the lane's next row keeps it."""

    def split(self, parts: int) -> "list[Rows]":
        """Return the lanes in so many equal shares, in their order."""
        return [Rows(*share) for share in zip(*(np.split(x, parts) for x in vars(self).values()), strict=True)]

    @classmethod
    def join(cls, shares: "list[Rows]") -> "Rows":
        """Return what was split."""
        return cls(*(np.concatenate(x) for x in zip(*(vars(share).values() for share in shares), strict=True)))


class EndOfData(Exception):  # noqa: N818 - not an error
    """A mix has come to its end, as it asked for; the message says why."""


class Queue(Protocol):
    """A queue of documents, mostly endless."""

    def next(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """Return a document's tokens (length,), and which of its targets count (length,), or None if all do.

        Raises:
            EndOfData: there is none any more.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on exactly here."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


class Prepared:
    """The documents of a prepared mix: once in the mix's order, then over and over in orders drawn from the seed.

    Args:
        documents: the mix's, in its order.
        seed: of the orders after the first.
    """

    def __init__(self, documents: Documents, seed: int) -> None:
        self._documents, self._seed = documents, seed
        self._epoch = self._cursor = 0
        self._order = self._permutation()

    def _permutation(self) -> Int64:
        standing = np.arange(len(self._documents))
        return np.random.default_rng([self._seed, self._epoch]).permutation(standing) if self._epoch else standing

    def next(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """Return the next document (see `Queue`)."""
        if self._cursor == len(self._order):
            self._epoch += 1
            self._cursor = 0
            self._order = self._permutation()
        self._cursor += 1
        index = int(self._order[self._cursor - 1])
        return self._documents[index], self._documents.counted(index)

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain values, all that `load_state_dict` needs to go on exactly here."""
        state = {"documents": len(self._documents), "seed": self._seed}
        return state | {"epoch": self._epoch, "cursor": self._cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; raise `UserError` if there were other documents, or another seed."""
        for key, here in (("documents", len(self._documents)), ("seed", self._seed)):
            _require_equal(key, state[key], here)
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()


@dataclass
class _Lane:
    """What is left of the document that a lane is in."""

    tokens: npt.NDArray[Any]
    counted: npt.NDArray[np.bool_] | None = None
    number: int = -1
    """Of the document in the lane."""


class Lanes:
    """Endless streams of documents, one a lane. A lane that needs a document takes the next one of a shared queue."""

    def __init__(self, queue: Queue, lanes: int, eod: int) -> None:
        self._queue, self._eod = queue, eod
        self._lanes = [_Lane(np.empty(0, np.int64)) for _ in range(lanes)]

    def next(self, length: int) -> Rows:
        """Return the next `length` tokens of every lane; raise `EndOfData` where a lane finds no more documents."""
        shape = (len(self._lanes), length)
        rows = Rows(*(np.empty(shape, np.int64) for _ in range(3)))
        for number, lane in enumerate(self._lanes):
            self._fill(lane, rows.input_ids[number], rows.targets[number], rows.document_ids[number])
        return rows

    def _fill(self, lane: _Lane, input_ids: Int64, targets: Int64, document_ids: Int64) -> None:
        at = 0
        while at < len(input_ids):
            if not len(lane.tokens):
                lane.tokens, lane.counted = self._queue.next()
                lane.number += 1
            end = min(at + len(lane.tokens), len(input_ids))
            step = end - at
            input_ids[at:end] = lane.tokens[:step]
            document_ids[at:end] = lane.number
            after = lane.tokens[1 : step + 1]
            targets[at : at + len(after)] = after
            targets[at + len(after) : end] = self._eod
            lane.tokens = lane.tokens[step:]
            if lane.counted is not None:
                targets[at:end][~lane.counted[:step]] = IGNORED
                lane.counted = lane.counted[step:]
            at = end

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on exactly here, the rests of the open documents among it."""
        lanes = [
            [lane.tokens.tolist(), None if lane.counted is None else lane.counted.tolist(), lane.number]
            for lane in self._lanes
        ]
        return {"queue": self._queue.state_dict(), "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the lanes stood that gave `state`.

        Raises:
            UserError: there were more or fewer of them, or they had another queue.
        """
        _require_equal("lanes", len(state["lanes"]), len(self._lanes))
        self._queue.load_state_dict(state["queue"])
        self._lanes = [
            _Lane(np.array(tokens, np.int64), None if counted is None else np.array(counted, np.bool_), number)
            for tokens, counted, number in state["lanes"]
        ]


def _require_equal(key: str, there: int, here: int) -> None:
    if there != here:
        raise UserError(f"cannot resume the data: the checkpoint has {key} = {there}, this run {here}")
