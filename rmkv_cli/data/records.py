"""Files of records, read in numbered blocks: jsonl, csv, parquet, arrow, any other text, also .gz.

A block is what is read at once: some megabytes of lines, up to 4,096 rows of a row group, a record batch, a text or,
where that is longer than a megabyte, a part of it.
Reading can begin at any block, at once where the format allows it.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rmkv_cli.data.texts import Part, decode, decoded, read_text
from rmkv_cli.errors import UserError

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 4096
RECORDS = {".jsonl", ".csv", ".parquet", ".arrow"}
TEXTS = {".txt", ".md", ".py", ".tex", ".html"}  # of the files of a hub; a local one is text whatever its name


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read: where it stands, and what is wrong with it."""

    where: str
    what: str

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


@dataclass(frozen=True)
class File:
    """A file of records, wherever it lies."""

    name: str
    """As people know it."""
    blocks: Callable[[Position, Sequence[str]], Iterator[Block]]
    """Yields its blocks from a position on; of records that have these columns no others may be read."""

    @classmethod
    def local(cls, path: Path) -> "File":
        """Return a file on this machine."""
        return cls(str(path), partial(read_blocks, str(path), lambda: path.open("rb")))


def suffix(name: str) -> str:
    """Return the lower-case suffix that tells a file's kind, without .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


def read_blocks(
    name: str, open_it: Callable[[], IO[bytes]], start: Position, columns: Sequence[str]
) -> Iterator[Block]:
    """Yield a file's blocks from the one at `start` on.

    Of records that have these columns no others may be read. A text is one record with the first of them, or where it
    is long several, its parts. What is wrong with the file itself is a bad record, too.

    Raises:
        OSError: it cannot be read.
        UserError: a long text changed while it was read.
    """

    def reread() -> Iterator[str]:
        with open_it() as raw:
            yield from decoded(_unzipped(name, raw))

    try:
        with open_it() as raw:
            if not raw.read(1):
                yield START, [BadRecord(name, "is empty")]
                return
            raw.seek(0)
            stream = _unzipped(name, raw)
            match suffix(name):
                case ".jsonl":
                    yield from _jsonl_blocks(name, stream, start)
                case ".csv":
                    yield from _csv_blocks(name, stream, start)
                case ".parquet":
                    yield from _parquet_blocks(name, stream, start, columns)
                case ".arrow":
                    yield from _arrow_blocks(name, stream, start, columns)
                case _:
                    yield from _text_blocks(name, stream, start, columns[0], reread)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield (sys.maxsize, 0), [BadRecord(name, f"is not a whole gzip file ({error})")]


def _text_blocks(
    name: str, stream: IO[bytes], start: Position, column: str, reread: Callable[[], Iterator[str]]
) -> Iterator[Block]:
    """Yield a text as one record, or where it is long in parts, each a block."""
    try:
        for offset, text, part in read_text(stream, start[0], reread):
            yield (offset, FIRST_PART[1]) if part else START, [Record(name, {column: text}, part)]
    except ValueError as error:
        yield START, [BadRecord(name, str(error))]
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _unzipped(name: str, raw: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw  # type: ignore[return-value]


def _jsonl_blocks(name: str, stream: IO[bytes], start: Position) -> Iterator[Block]:
    offset, number = start
    stream.seek(offset)
    while lines := list(_some_lines(stream)):
        yield (offset, number), [_json_record(f"{name}:{n}", x) for n, x in enumerate(lines, number + 1) if x.strip()]
        offset += sum(map(len, lines))
        number += len(lines)


def _some_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield a block's lines: of a gzip file that is damaged those before the damage, which the next call meets."""
    size = 0
    try:
        while size < BLOCK_BYTES and (line := stream.readline()):
            size += len(line)
            yield line
    except (gzip.BadGzipFile, EOFError, zlib.error):
        if not size:
            raise


def _json_record(where: str, line: bytes) -> Record | BadRecord:
    try:
        columns = json.loads(decode(line.rstrip(b"\r\n")))
    except json.JSONDecodeError as error:
        return BadRecord(where, f"is not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRecord(where, str(error))
    if isinstance(columns, dict):
        return Record(where, columns)
    return BadRecord(where, f"is not a JSON object but {describe(columns)}")


class _Lines:
    """Lines as csv wants them, and how many bytes of them it has taken."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.taken = stream, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.stream:
            text = line if self.taken else line.removeprefix(codecs.BOM_UTF8)
            self.taken += len(line)
            # A byte that is not UTF-8 spoils its own row alone: a lone surrogate is found when the text is checked.
            yield text.decode("utf-8", "surrogateescape")


def _csv_blocks(name: str, stream: IO[bytes], start: Position) -> Iterator[Block]:
    csv.field_size_limit(sys.maxsize)
    lines = _Lines(stream)
    rows = csv.reader(iter(lines), strict=True)
    try:
        names = next(rows, [])
    except csv.Error as error:
        yield START, [BadRecord(f"{name}:1", f"is not valid CSV: {error}")]
        return
    start = max(start, (lines.taken, rows.line_num))
    stream.seek(start[0])
    lines.taken = start[0]
    rows, before = csv.reader(iter(lines), strict=True), start[1]
    ended = False
    while not ended:
        position = lines.taken, before + rows.line_num
        block: list[Record | BadRecord] = []
        while not ended and lines.taken - position[0] < BLOCK_BYTES:
            where = f"{name}:{before + rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                block.append(BadRecord(where, f"is not valid CSV: {error}"))
                continue
            ended = row is None
            if row and len(row) != len(names):
                what = f"has {len(row)} fields where the first line names {len(names)} columns"
                block.append(BadRecord(where, what))
            elif row:
                block.append(Record(where, dict(zip(names, row, strict=True))))
        yield position, block


def _parquet_blocks(name: str, stream: IO[bytes], start: Position, columns: Sequence[str]) -> Iterator[Block]:
    group, at = start[0], 0
    try:
        if isinstance(stream, gzip.GzipFile):  # parquet is read from its end, which gzip cannot
            stream = io.BytesIO(stream.read())
        file = pq.ParquetFile(stream)
        chosen = _chosen(columns, file.schema_arrow)
        at = sum(file.metadata.row_group(i).num_rows for i in range(group))
        while group < file.num_row_groups:
            for rows in file.iter_batches(BLOCK_ROWS, [group], chosen):
                if at >= start[1]:
                    yield (group, at), _rows(name, rows, at)
                at += len(rows)
            group += 1
    except (pa.ArrowException, ValueError, OSError) as error:
        _require_of_content(error)
        yield (group, at), [_unreadable(name, at, "Parquet", error)]


def _arrow_blocks(name: str, stream: IO[bytes], start: Position, columns: Sequence[str]) -> Iterator[Block]:
    batch, before = start
    try:
        stream = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
        batches: Iterator[pa.RecordBatch]
        if stream.read(6) == b"ARROW1":
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(i) for i in range(batch, file.num_record_batches))
        else:
            stream.seek(0)
            batches = itertools.islice(pa.ipc.open_stream(stream), batch, None)
        for rows in batches:
            yield (batch, before), _rows(name, rows.select(_chosen(columns, rows.schema)), before)
            batch, before = batch + 1, before + len(rows)
    except (pa.ArrowException, ValueError, OSError) as error:
        _require_of_content(error)
        yield (batch, before), [_unreadable(name, before, "Arrow", error)]


def _rows(name: str, rows: pa.RecordBatch, before: int) -> list[Record | BadRecord]:
    """Return a batch's rows; one that is not UTF-8 spoils itself alone."""

    def row(i: int) -> Record | BadRecord:
        where = f"{name}:{before + i + 1}"
        try:
            return Record(where, rows.slice(i, 1).to_pylist()[0])
        except UnicodeDecodeError as error:
            return BadRecord(where, f"is not valid UTF-8: {error.reason}")

    try:
        return [Record(f"{name}:{n}", columns) for n, columns in enumerate(rows.to_pylist(), before + 1)]
    except UnicodeDecodeError:
        return [row(i) for i in range(len(rows))]


def _chosen(columns: Sequence[str], schema: pa.Schema) -> list[str]:
    """Return the columns to read: all, lest one is missing, that people may be told what there is."""
    return list(columns) if set(columns) <= set(schema.names) else schema.names


def _require_of_content(error: Exception) -> None:
    """Raise again what a disk or a hub did: of a file's content Arrow makes plain errors without a number."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


def _unreadable(name: str, before: int, kind: str, error: Exception) -> BadRecord:
    return BadRecord(f"{name}:{before + 1}", f"is not readable as {kind}: {str(error).partition(chr(10))[0]}")


def describe(value: Any) -> str:
    """Return what people call a JSON value's type, with its article."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
