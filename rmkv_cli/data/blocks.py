"""Define the numbered blocks of good and bad records that files are read as."""

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
    """One or several consecutive records that cannot be read: their location and the fault."""

    where: str
    what: str
    records: int = 1
    """Number of records; 1 if the number is unknown."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Record:
    """The columns of one record, not yet validated, and its location."""

    where: str
    columns: dict[str, Any]
    part: Part | None = None
    """Part of the text that this record holds; None for the whole text."""


Position: TypeAlias = tuple[int, int]
"""Start of a block: its byte in a file of lines, or its row group's or record batch's number; then lines or rows before
it."""
START: Position = (0, 0)
FIRST_PART: Position = (0, 1)
"""Position of the first part of a long text. It differs from START, which is the only block of a text read whole."""
Block: TypeAlias = tuple[Position, list[Record | BadRecord]]
Blocks: TypeAlias = Iterator[Block]


def named_twice(name: str, columns: Sequence[str], names: Sequence[str]) -> BadRecord | None:
    """Return the fault of a file in which several columns share the name of a requested column, else None."""
    times = Counter(names)
    for column in columns:
        if times[column] > 1:
            return BadRecord(name, f"has {times[column]} columns named '{column}'; rename all but the one to read")
    return None
