"""The order in which a source's records are read, and positions in it."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.data.blocks import FIRST_PART, START, BadRecord, Position, Record
from rmkv_cli.data.records import File


@dataclass(frozen=True)
class Place:
    """Place in the order of a source: the record that is read next."""

    epoch: int = 0
    """Number of epochs before this one."""
    file: int = 0
    """Index of the file in this epoch's order."""
    block: Position = START
    """Position of the block in the file."""
    record: int = 0
    """Index of the record in this block's order."""

    def to_json(self) -> list[Any]:
        """Return plain values for `from_json`."""
        return list(astuple(self))

    @classmethod
    def from_json(cls, value: list[Any]) -> "Place":
        """Return the place from the values of `to_json`."""
        epoch, file, (where, before), record = value
        return cls(epoch, file, (where, before), record)


def ordered(
    files: Sequence[File], columns: Sequence[str], seed: Sequence[int] | None, place: Place
) -> Iterator[tuple[Place, Record | BadRecord]]:
    """Yield the records of one epoch from `place` on, each with the place after it; errors as in `read_blocks`.

    The seed and the epoch determine the order of the files. The blocks of a file keep their order. The seed, the epoch
    and the block's position determine the order of the records within a block. So a place is a few numbers, and
    resuming rereads a single block. Without a seed, everything keeps its order.
    """

    def permuted(length: int, *at: int) -> NDArray[np.int64]:
        return np.arange(length) if seed is None else np.random.default_rng([*seed, *at]).permutation(length)

    order = permuted(len(files), place.epoch)
    for number in range(place.file, len(files)):
        resumed = number == place.file
        file = files[order[number]]
        for block, records in file.blocks(place.block if resumed else START, columns):
            if block == FIRST_PART and resumed and place.block == START and place.record:
                break  # an earlier version read long texts whole, so its place has no parts
            within = permuted(len(records), place.epoch, int(order[number]), *block)
            first = place.record if resumed and block == place.block else 0
            for at in range(first, len(records)):
                yield Place(place.epoch, number, block, at + 1), records[within[at]]
