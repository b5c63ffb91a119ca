"""Read Parquet and Arrow files in blocks of rows. Damage loses only the rows that it makes unreadable."""

import gzip
import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import IO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rmkv_cli.data import blocks
from rmkv_cli.data.blocks import BadRecord, Blocks, Position, Record, named_twice

Rows: TypeAlias = list[Record | BadRecord]
FAULTS = (pa.ArrowException, ValueError, OSError, MemoryError)
"""Errors that damaged content raises; a damaged size may request any amount of memory."""
MAGIC = b"ARROW1\0\0"


def parquet_blocks(name: str, stream: IO[bytes], start: Position, columns: Sequence[str]) -> Blocks:
    """Yield a file's blocks from `start` on; a block has up to `BLOCK_ROWS` rows of one row group.

    A damaged page loses the rest of its row group, because the library cannot skip a page.
    """
    try:
        file = pq.ParquetFile(_seekable(stream), page_checksum_verification=True)
    except FAULTS as error:
        yield start, [_lost(name, start[1], None, "Parquet", error)]
        return
    if twice := named_twice(name, columns, file.schema_arrow.names):
        yield start, [twice]
        return
    chosen = _chosen(columns, file.schema_arrow)
    end = sum(file.metadata.row_group(i).num_rows for i in range(start[0]))
    for group in range(start[0], file.num_row_groups):
        first = at = end
        end += file.metadata.row_group(group).num_rows
        try:
            for rows in file.iter_batches(blocks.BLOCK_ROWS, [group], chosen):
                if at >= start[1]:
                    yield (group, at), _rows(name, rows, at)
                at += len(rows)
            if at < end:
                raise ValueError("its row group has fewer rows than its metadata says")
        except FAULTS as error:
            _reraise_io_error(error)
            good: Rows = []
            with _until_damage():
                # Read row by row: most rows of the block that failed are good.
                for number, row in enumerate(file.iter_batches(1, [group], chosen), first):
                    if number >= at:
                        good += _rows(name, row, number)
            lost = end - at - len(good)
            yield (group, at), [*good, _lost(name, end - lost, lost, "Parquet", error)]


def arrow_blocks(name: str, stream: IO[bytes], start: Position, columns: Sequence[str]) -> Blocks:
    """Yield a file's blocks from `start` on; a block is a record batch."""
    try:
        file = pa.PythonFile(_seekable(stream), mode="r")
        schema, batches = _open(file, start[0])
    except FAULTS as error:
        yield start, [_lost(name, start[1], None, "Arrow", error)]
        return
    if twice := named_twice(name, columns, schema.names):
        yield start, [twice]
        return
    chosen = _chosen(columns, schema)
    before = start[1]
    for number, batch in enumerate(batches, start[0]):
        if isinstance(batch, _Unreadable):
            yield (number, before), [_lost(name, before, batch.rows, "Arrow", batch.error)]
            before += batch.rows or 0
        else:
            yield (number, before), _checked_rows(name, batch.select(chosen), before)
            before += len(batch)


@dataclass(frozen=True)
class _Unreadable:
    """A record batch that cannot be read, and its number of rows if known."""

    error: Exception
    rows: int | None


_Batches: TypeAlias = Iterator[pa.RecordBatch | _Unreadable]


def _open(file: pa.PythonFile, first: int) -> tuple[pa.Schema, _Batches]:
    """Return an Arrow file's schema and its record batches from number `first` on."""
    if file.read(len(MAGIC)) == MAGIC:
        with _until_damage():
            reader = pa.ipc.open_file(file)
            return reader.schema, _batches_of_file(file, reader, first)
        file.seek(len(MAGIC))  # the footer is damaged or missing; the rest of the file is a valid stream
    else:
        file.seek(0)
    reader = pa.ipc.open_stream(file)
    return reader.schema, _batches_of_stream(file, reader, first)


def _batches_of_file(file: pa.PythonFile, reader: pa.RecordBatchFileReader, first: int) -> _Batches:
    lengths: list[int] | None = None
    for number in range(first, reader.num_record_batches):
        try:
            batch = reader.get_batch(number)
        except FAULTS as error:
            _reraise_io_error(error)
            if lengths is None:
                lengths = list(_lengths(file))
            batch = _Unreadable(error, lengths[number] if number < len(lengths) else None)
        yield batch


def _batches_of_stream(file: pa.PythonFile, reader: pa.RecordBatchStreamReader, first: int) -> _Batches:
    for number in count():
        begin = file.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except FAULTS as error:
            _reraise_io_error(error)
            file.seek(begin)
            rows = next(_messages(file), None)  # leaves the file at the next batch
            batch = _Unreadable(error, rows)
            if rows is None:
                yield batch
                return
        if number >= first:
            yield batch


def _lengths(file: pa.PythonFile) -> Iterator[int]:
    """Yield the number of rows of each record batch, up to the first batch with a damaged message."""
    file.seek(len(MAGIC))
    return _messages(file)


def _messages(file: pa.PythonFile) -> Iterator[int]:
    """Read the record batches from here on without their columns; yield each one's number of rows until damage."""
    with _until_damage(), suppress(EOFError):
        while True:
            message = pa.ipc.read_message(file)
            if message.type == "record batch":
                yield _length(bytes(message.metadata))


def _length(message: bytes) -> int:
    """Return the number of rows in a record batch. The library itself reads it only together with the columns.

    A message is a flatbuffer. Field 2 of its root table is the batch; field 0 of the batch is its length.
    """

    def place(table: int, field: int) -> int:
        fields = table - struct.unpack_from("<i", message, table)[0]
        (size,) = struct.unpack_from("<H", message, fields)
        offset = struct.unpack_from("<H", message, fields + 4 + 2 * field)[0] if 4 + 2 * field < size else 0
        return table + offset if offset else 0

    def follow(pointer: int) -> int:
        return pointer + int(struct.unpack_from("<I", message, pointer)[0])

    length = place(follow(place(follow(0), 2)), 0)
    return max(0, struct.unpack_from("<q", message, length)[0]) if length else 0


def _seekable(stream: IO[bytes]) -> IO[bytes]:
    """Return a seekable file; a compressed one is decompressed into memory."""
    return io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream


def _checked_rows(name: str, rows: pa.RecordBatch, before: int) -> Rows:
    """Return a batch's rows; a damaged row becomes a bad record.

    Only full validation keeps Python from reading beyond the batch's memory. Of 2,000 files with a flipped bit, 11
    crashed the process after `validate()`, and none after `validate(full=True)`.
    """
    try:
        rows.validate()
    except pa.ArrowInvalid as error:  # the rows cannot be separated
        return [_lost(name, before, len(rows), "Arrow", error)]
    try:
        rows.validate(full=True)
        return _rows(name, rows, before)
    except pa.ArrowInvalid:
        return [_checked_row(name, rows.slice(i, 1), before + i) for i in range(len(rows))]


def _checked_row(name: str, row: pa.RecordBatch, before: int) -> Record | BadRecord:
    try:
        row.validate(full=True)
    except pa.ArrowInvalid as error:
        what = "is not valid UTF-8: " if "UTF8" in str(error) else "is damaged: "
        return BadRecord(f"{name}:{before + 1}", what + _first_line(error))
    return _rows(name, row, before)[0]


def _rows(name: str, rows: pa.RecordBatch, before: int) -> Rows:
    """Return a batch's rows; only a row that is not UTF-8 itself becomes a bad record."""

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
    """Return the columns to read; all of them if one is missing, so that the error can list what exists."""
    return list(columns) if set(columns) <= set(schema.names) else schema.names


def _lost(name: str, before: int, rows: int | None, kind: str, error: Exception) -> BadRecord:
    """Return the bad record that stands for `rows` rows; None: all rows to the file's end, or a whole batch.

    Raises:
        OSError: the disk or the hub failed, not the file's content.
    """
    _reraise_io_error(error)
    what = f"not readable as {kind}: {_first_line(error)}"
    if rows is None:
        return BadRecord(f"{name}:{before + 1}", f"is {what}; the number of lost records is unknown")
    if rows > 1:
        return BadRecord(f"{name}:{before + 1}-{before + rows}", f"{rows:,} records are {what}", rows)
    return BadRecord(f"{name}:{before + 1}", f"is {what}", rows)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def _until_damage() -> Iterator[None]:
    """Stop silently at damaged content."""
    try:
        yield
    except FAULTS as error:
        _reraise_io_error(error)


def _reraise_io_error(error: Exception) -> None:
    """Raise the error again if the disk or the hub caused it. Arrow's errors about content have no errno."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
