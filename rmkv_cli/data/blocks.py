"""What files of records are read as: numbered blocks of records, good and bad."""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rmkv_cli.data.texts import Part

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 4096
DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read, or several in a row: where they stand, and what is wrong with them."""

    where: str
    what: str
    records: int = 1
    """How many they are; 1 also where that cannot be known."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Record:
    """The columns of one record, unchecked, and where it stands."""

    where: str
    columns: dict[str, Any]
    part: Part | None = None
    """Which part of its text this is; None: all of it."""


Position: TypeAlias = tuple[int, int]
"""Where a block begins: byte of a file of lines, or number of a row group or record batch; lines or rows before it."""
START: Position = (0, 0)
FIRST_PART: Position = (0, 1)
"""Of a long text, so that it is told from START: a place in the only block of a text that was read whole."""
Block: TypeAlias = tuple[Position, list[Record | BadRecord]]
Blocks: TypeAlias = Iterator[Block]


def named_twice(name: str, columns: Sequence[str], names: Sequence[str]) -> BadRecord | None:
    """Return what is wrong with a file in which several columns have the name of one that is to be read."""
    times = Counter(names)
    for column in columns:
        if times[column] > 1:
            return BadRecord(name, f"has {times[column]} columns named '{column}'; rename all but the one to read")
    return None
