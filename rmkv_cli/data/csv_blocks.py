"""Read files of comma-separated values in blocks of lines."""

import codecs
import csv
import sys
from collections import deque
from collections.abc import Sequence
from typing import IO

from rmkv_cli.data import blocks
from rmkv_cli.data.blocks import DAMAGED_GZIP, START, BadRecord, Blocks, Position, Record, named_twice

SPAN_BYTES = 32 << 20


def csv_blocks(name: str, stream: IO[bytes], start: Position, columns: Sequence[str]) -> Blocks:
    """Yield a file's blocks from `start` on; a row that cannot be parsed loses only its first line.

    A row may have up to `SPAN_BYTES` bytes. At twice that size its quote counts as unclosed.
    """
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(stream, *START)
    try:
        names = next(csv.reader(lines, strict=True), [])
    except csv.Error as error:
        yield START, [BadRecord(f"{name}:1", f"is not valid CSV: {error}")]
        return
    if twice := named_twice(f"{name}:1", columns, names):
        yield START, [twice]
        return
    start = max(start, (lines.at, lines.number))
    stream.seek(start[0])
    lines = _Lines(stream, *start)
    rows = csv.reader(lines, strict=True)
    ended = False
    while not ended:
        position = lines.at, lines.number
        block: list[Record | BadRecord] = []
        try:
            while not ended and lines.at - position[0] < blocks.BLOCK_BYTES:
                where = f"{name}:{lines.number + 1}"
                lines.begin_record()
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    block.append(BadRecord(where, f"is not valid CSV: {error}"))
                    lines.give_up_record()
                    continue
                ended = row is None
                if row and len(row) != len(names):
                    what = f"has {len(row)} fields where the first line names {len(names)} columns"
                    block.append(BadRecord(where, what))
                elif row:
                    block.append(Record(where, dict(zip(names, row, strict=True))))
        except DAMAGED_GZIP:
            if block:
                yield position, block
            raise
        yield position, block


class _Lines:
    """An iterator of lines for `csv`, which repeats all but the first line of a record that is given up.

    Args:
        stream: the file to read.
        at: bytes before the next line.
        number: lines before the next line.
    """

    def __init__(self, stream: IO[bytes], at: int, number: int) -> None:
        self.at, self.number = at, number
        self._stream = stream
        self._again: deque[bytes] = deque()
        self._unclosed_before = 0
        """Byte before which no record of more than one line can be parsed."""
        self.begin_record()

    def begin_record(self) -> None:
        """Treat the next line as the first line of a record."""
        self._begun, self._record = self.at, list[bytes]()

    def give_up_record(self) -> None:
        """Go back to the second line of the record.

        All later lines of this record began inside quotes. A later record that reaches one of them inside quotes fails
        in the same way, so it is given up early. Otherwise a file with many unclosed quotes would take quadratic time.
        """
        end = min(self.at - len(self._record[-1]), (self._begun // SPAN_BYTES + 1) * SPAN_BYTES)
        self._unclosed_before = max(self._unclosed_before, end)
        first, *rest = self._record
        self._again.extendleft(reversed(rest))
        self.at, self.number = self._begun + len(first), self.number - len(rest)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        # Spans begin at multiples of their size. A reader that resumes here therefore gives up a record at the same
        # place as one that began at the start of the file.
        spans = self.at // SPAN_BYTES - self._begun // SPAN_BYTES
        if self._record and (spans > 1 or self._begun < self._unclosed_before):
            raise csv.Error("a quote is not closed")
        line = self._again.popleft() if self._again else self._stream.readline()
        if not line:
            raise StopIteration
        text = line if self.at else line.removeprefix(codecs.BOM_UTF8)
        self._record.append(line)
        self.at += len(line)
        self.number += 1
        # An invalid byte becomes a lone surrogate. The check of the text finds it, so only its own row is lost.
        return text.decode("utf-8", "surrogateescape")
