"""The order in which a source's records are read, and where in it a reader stands."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.data.blocks import FIRST_PART, START, BadRecord, Position, Record
from rmkv_cli.data.records import File


@dataclass(frozen=True)
class Place:
    """How far a source has been read: the record that comes next."""

    epoch: int = 0
    """How often it has been read to its end."""
    file: int = 0
    """In the order of this epoch."""
    block: Position = START
    """Of the file."""
    record: int = 0
    """In the order of this block."""

    def to_json(self) -> list[Any]:
        """Return plain values that `from_json` takes back."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, value: list[Any]) -> "Place":
        """Return the place that `to_json` told."""
        epoch, file, (where, before), record = value
        return cls(epoch, file, (where, before), record)


def ordered(
    files: Sequence[File], columns: Sequence[str], seed: Sequence[int] | None, place: Place
) -> Iterator[tuple[Place, Record | BadRecord]]:
    """Yield the records of one epoch from `place` on, each with the place after it; errors as in `read_blocks`.

    The files are in an order drawn from the seed and the epoch; the blocks of a file follow one another, and the
    records of a block are in an order drawn from these and from where it stands. So a place is a few numbers, and
    reading goes on at it when one block has been read again. Without a seed all are in the order in which they stand.
    """

    def permuted(length: int, *at: int) -> NDArray[np.int64]:
        return np.arange(length) if seed is None else np.random.default_rng([*seed, *at]).permutation(length)

    order = permuted(len(files), place.epoch)
    for number in range(place.file, len(files)):
        again = number == place.file
        file = files[order[number]]
        for block, records in file.blocks(place.block if again else START, columns):
            if block == FIRST_PART and again and place.block == START and place.record:
                break  # an earlier version read long texts whole, so its place has no parts
            within = permuted(len(records), place.epoch, int(order[number]), *block)
            first = place.record if again and block == place.block else 0
            for at in range(first, len(records)):
                yield Place(place.epoch, number, block, at + 1), records[within[at]]
