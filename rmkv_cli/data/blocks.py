"""Blocks of good and bad records, the units in which files are read."""

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
    """One or several consecutive records that cannot be read."""

    where: str
    """Location in the file, for messages."""
    what: str
    """What is wrong."""
    records: int = 1
    """Number of records; 1 if the number is unknown."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Record:
    """The columns of one record, not yet validated."""

    where: str
    """Location in the file, for messages."""
    columns: dict[str, Any]
    part: Part | None = None
    """Part of the text that this record contains; None for the whole text."""


Position: TypeAlias = tuple[int, int]
"""Start of a block. First its byte in a file of lines, or the number of its row group or record batch; then the number
of lines or rows before it."""
START: Position = (0, 0)
FIRST_PART: Position = (0, 1)
"""Position of the first part of a long text. It differs from START, which is the only block of a text read whole."""
Block: TypeAlias = tuple[Position, list[Record | BadRecord]]
Blocks: TypeAlias = Iterator[Block]


def named_twice(name: str, columns: Sequence[str], names: Sequence[str]) -> BadRecord | None:
    """Return the fault of a file in which several columns share the name of a requested column, else None."""
    counts = Counter(names)
    for column in columns:
        if counts[column] > 1:
            return BadRecord(name, f"has {counts[column]} columns named '{column}'; rename all but the one to read")
    return None
