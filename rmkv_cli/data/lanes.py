"""Rows of packed documents, in lanes: nothing cropped, nothing padded, exactly resumable."""

from dataclasses import dataclass
from typing import Any

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


@dataclass
class _Lane:
    """Where a lane stands."""

    document: int | None = None
    """Index of the document that it is in."""
    offset: int = 0
    """Tokens of it that were given."""
    count: int = -1
    """Its number in the lane."""


class Lanes:
    """Endless streams of documents, one a lane. Each epoch shows every token of every document exactly once.

    A lane that needs a document takes the next one of a queue that all lanes share: the documents in an order drawn
    from (seed, 0), then in one drawn from (seed, 1), and so on.
    """

    def __init__(self, documents: Documents, lanes: int, seed: int) -> None:
        self._documents = documents
        self._seed = seed
        self._epoch = self._cursor = 0
        self._order = self._permutation()
        self._lanes = [_Lane() for _ in range(lanes)]

    def _permutation(self) -> Int64:
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._documents))

    def _take(self) -> int:
        if self._cursor == len(self._order):
            self._epoch += 1
            self._cursor = 0
            self._order = self._permutation()
        self._cursor += 1
        return int(self._order[self._cursor - 1])

    def next(self, length: int) -> Rows:
        """Return the next `length` tokens of every lane."""
        shape = (len(self._lanes), length)
        rows = Rows(*(np.empty(shape, np.int64) for _ in range(3)))
        for number, lane in enumerate(self._lanes):
            self._fill(lane, rows.input_ids[number], rows.targets[number], rows.document_ids[number])
        return rows

    def _fill(self, lane: _Lane, input_ids: Int64, targets: Int64, document_ids: Int64) -> None:
        at = 0
        while at < len(input_ids):
            if lane.document is None:
                lane.document, lane.offset, lane.count = self._take(), 0, lane.count + 1
            rest = self._documents[lane.document][lane.offset :]
            end = min(at + len(rest), len(input_ids))
            step = end - at
            input_ids[at:end] = rest[:step]
            document_ids[at:end] = lane.count
            counted = self._documents.counted(lane.document)
            offset = lane.offset
            if step == len(rest):
                targets[at : end - 1] = rest[1:]
                targets[end - 1] = self._documents.eod
                lane.document = None
            else:
                targets[at:end] = rest[1 : step + 1]
                lane.offset += step
            if counted is not None:
                targets[at:end][~counted[offset : offset + step]] = IGNORED
            at = end

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain JSON values, all that `load_state_dict` needs to go on exactly here."""
        return {
            "documents": len(self._documents),
            "seed": self._seed,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "lanes": [[lane.document, lane.offset, lane.count] for lane in self._lanes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the lanes stood that gave `state`.

        Raises:
            UserError: they had another number of documents or lanes, or another seed.
        """
        now = self.state_dict()
        for key, there, here in (
            ("documents", state["documents"], now["documents"]),
            ("lanes", len(state["lanes"]), len(now["lanes"])),
            ("seed", state["seed"], now["seed"]),
        ):
            if there != here:
                raise UserError(f"cannot resume the data: the checkpoint has {key} = {there}, this run {here}")
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()
        self._lanes = [_Lane(*lane) for lane in state["lanes"]]
