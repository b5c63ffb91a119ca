"""Read files of records in blocks: jsonl, csv, parquet, arrow and any other text, each also as .gz.

A block is some megabytes of lines, up to 4,096 rows of a row group, a record batch, a text, or a part of a text longer
than a megabyte. Reading can start at any block, without reading earlier ones if the format allows it.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from rmkv_cli.data import blocks
from rmkv_cli.data.blocks import DAMAGED_GZIP, FIRST_PART, START, BadRecord, Block, Position, Record, named_twice
from rmkv_cli.data.columnar import arrow_blocks, parquet_blocks
from rmkv_cli.data.csv_blocks import csv_blocks
from rmkv_cli.data.texts import decode, decoded, read_text
from rmkv_cli.errors import UserError
from rmkv_cli.files import HEAD, file_fault, text_fault

RECORDS = {".jsonl", ".csv", ".parquet", ".arrow"}
TEXTS = {".txt", ".md", ".py", ".tex", ".html"}
"""Suffixes of text files on the hub. A local file with any other suffix is read as text."""


@dataclass(frozen=True)
class File:
    """A file of records, local or on the hub."""

    name: str
    """Name in messages."""
    blocks: Callable[[Position, Sequence[str]], Iterator[Block]]
    """Function that yields the blocks from a position on; it may read only the given columns."""

    @classmethod
    def local(cls, path: Path) -> "File":
        """Return a file on this machine."""
        return cls(str(path), partial(read_blocks, str(path), lambda: path.open("rb")))


def suffix(name: str) -> str:
    """Return the lower-case suffix that determines a file's kind, without .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


def read_blocks(
    name: str, open_file: Callable[[], IO[bytes]], start: Position, columns: Sequence[str]
) -> Iterator[Block]:
    """Yield a file's blocks from the one at `start` on.

    If records have all of `columns`, other columns may be skipped. A text is one record with the first of `columns`; a
    long text is several records, one for each part. A fault of the file itself is a bad record too.

    Raises:
        OSError: the file cannot be read.
        UserError: a long text changed while it was read.
    """

    def reread() -> Iterator[str]:
        with open_file() as raw:
            yield from decoded(unzipped(name, raw))

    try:
        with open_file() as raw:
            if not raw.read(1):
                yield START, [BadRecord(name, "is empty")]
                return
            raw.seek(0)
            stream = unzipped(name, raw)
            kind = suffix(name)
            head = stream.read(HEAD)
            stream.seek(0)
            if what := (file_fault if kind in (".parquet", ".arrow") else text_fault)(head):
                yield START, [BadRecord(name, what)]
                return
            match kind:
                case ".jsonl":
                    yield from _jsonl_blocks(name, stream, start, columns)
                case ".csv":
                    yield from csv_blocks(name, stream, start, columns)
                case ".parquet":
                    yield from parquet_blocks(name, stream, start, columns)
                case ".arrow":
                    yield from arrow_blocks(name, stream, start, columns)
                case _:
                    yield from _text_blocks(name, stream, start, columns[0], reread)
    except DAMAGED_GZIP as error:
        yield (sys.maxsize, 0), [BadRecord(name, f"is not a whole gzip file ({error})")]


def _text_blocks(
    name: str, stream: IO[bytes], start: Position, column: str, reread: Callable[[], Iterator[str]]
) -> Iterator[Block]:
    """Yield a text as one record, or a long text in parts; each is a block."""
    try:
        for offset, text, part in read_text(stream, start[0], reread):
            yield (offset, FIRST_PART[1]) if part else START, [Record(name, {column: text}, part)]
    except ValueError as error:
        yield START, [BadRecord(name, str(error))]
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def unzipped(name: str, raw: IO[bytes]) -> IO[bytes]:
    """Return a file's content, decompressed if its name ends in .gz."""
    return gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw  # type: ignore[return-value]


def _jsonl_blocks(name: str, stream: IO[bytes], start: Position, columns: Sequence[str]) -> Iterator[Block]:
    offset, number = start
    stream.seek(offset)
    while lines := list(_block_lines(stream)):
        numbered = enumerate(lines, number + 1)
        yield (offset, number), [_json_record(f"{name}:{n}", x, columns) for n, x in numbered if x.strip()]
        offset += sum(map(len, lines))
        number += len(lines)


def _block_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield a block's lines; a damaged gzip file yields the lines before the damage and raises at the next call."""
    size = 0
    try:
        while size < blocks.BLOCK_BYTES and (line := stream.readline()):
            size += len(line)
            yield line
    except DAMAGED_GZIP:
        if not size:
            raise


def _json_record(where: str, line: bytes, requested: Sequence[str]) -> Record | BadRecord:
    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and (twice := named_twice(where, requested, [name for name, _ in pairs])):
            raise ValueError(twice.what)
        return found

    try:
        columns = json.loads(decode(line.rstrip(b"\r\n")), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        return BadRecord(where, f"is not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRecord(where, str(error))
    if isinstance(columns, dict):
        return Record(where, columns)
    return BadRecord(where, f"is not a JSON object but {describe(columns)}")


def describe(value: Any) -> str:
    """Return the name of a JSON value's type, with its article."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
