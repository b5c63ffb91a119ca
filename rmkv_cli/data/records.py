"""Local files as a stream of records, each known by file and line, through the `datasets` library."""

import csv
import glob
import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rmkv_cli.errors import UserError


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


def find_files(patterns: Sequence[str], base: Path) -> list[Path]:
    """Return the files that paths and globs (`**` crosses folders) match from `base`, sorted within a pattern.

    Raises:
        UserError: a pattern matches nothing, or a file is one of JSON, whose records have no lines.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        literal = base / pattern
        matches = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute ones
        files = [literal] if literal.is_file() else [base / m for m in sorted(matches) if (base / m).is_file()]
        if not files:
            what = f"is a folder; its files are {pattern}/**/*.txt, say" if literal.is_dir() else "no such file"
            raise UserError(f"{literal}: {what}")
        for file in files:
            if suffix(file) == ".json":
                raise UserError(f"{file}: is it text? name it .txt; is each line a record? name it .jsonl")
            found[file] = None
    return list(found)


def suffix(file: Path) -> str:
    """Return the lower-case suffix that tells a file's kind, without .gz."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_records(files: Sequence[Path], text_column: str) -> Iterator[Record | BadRecord]:
    """Yield the records of files in order: lines of jsonl, rows of csv and parquet, whole texts (as `text_column`)."""
    from datasets import IterableDataset
    from datasets.iterable_dataset import ExamplesIterable

    # What IterableDataset.from_generator makes, which would also leave a lock file in the user's cache each time.
    examples = ExamplesIterable(_all_records, {"files": list(files), "text_column": text_column})
    for example in IterableDataset(examples):
        yield example["record"]


def _all_records(files: list[Path], text_column: str) -> Iterator[tuple[int, dict[str, Record | BadRecord]]]:
    readers = {".jsonl": _jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}
    for key, file in enumerate(files):
        try:
            if file.stat().st_size == 0:
                records: Iterator[Record | BadRecord] = iter([BadRecord(str(file), "is empty")])
            elif suffix(file) in readers:
                records = readers[suffix(file)](file)
            else:
                records = iter([_text_record(file, text_column)])
            for record in records:
                yield key, {"record": record}
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            yield key, {"record": BadRecord(str(file), f"is not a whole gzip file ({error})")}


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _decode(data: bytes) -> str:
    """Return UTF-8 text without its byte order mark; raise `ValueError` saying what is wrong."""
    if b"\0" in data:
        raise ValueError("holds a NUL byte, so it is no text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f" (line {line})" if line > 1 else ""
        raise ValueError(f"is not valid UTF-8: byte {data[error.start]:#04x} at offset {error.start}{place}") from None


def _text_record(file: Path, column: str) -> Record | BadRecord:
    with _open(file) as stream:
        try:
            return Record(str(file), {column: _decode(stream.read())})
        except ValueError as error:
            return BadRecord(str(file), str(error))


def _jsonl_records(file: Path) -> Iterator[Record | BadRecord]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                columns = json.loads(_decode(line.rstrip(b"\r\n")))
            except json.JSONDecodeError as error:
                yield BadRecord(where, f"is not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield BadRecord(where, str(error))
            else:
                if isinstance(columns, dict):
                    yield Record(where, columns)
                else:
                    yield BadRecord(where, f"is not a JSON object but {describe(columns)}")


def _csv_records(file: Path) -> Iterator[Record | BadRecord]:
    # Not load_dataset("csv"): it ends at the first row with a field too many, and knows rows, not lines.
    csv.field_size_limit(sys.maxsize)
    with _open(file) as stream:
        # A byte that is not UTF-8 spoils its own row alone: as a lone surrogate it is found when the text is checked.
        rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in stream), strict=True)
        try:
            names = [name.removeprefix("\ufeff") for name in next(rows, [])]
        except csv.Error as error:
            yield BadRecord(f"{file}:1", f"is not valid CSV: {error}")
            return
        last = rows.line_num
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield BadRecord(f"{file}:{last + 1}", f"is not valid CSV: {error}")
                last = rows.line_num
                continue
            if row is None:
                return
            where, last = f"{file}:{last + 1}", rows.line_num
            if not row:
                continue
            if len(row) != len(names):
                yield BadRecord(where, f"has {len(row)} fields where the first line names {len(names)} columns")
            else:
                yield Record(where, dict(zip(names, row, strict=True)))


def _parquet_records(file: Path) -> Iterator[Record | BadRecord]:
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # a file it cannot read is reported here
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # else each file costs 5 s at its end
    number = 0
    with tempfile.TemporaryDirectory() as folder:  # its cache, lest it leaves a lock file in the user's
        path = file
        if file.name.lower().endswith(".gz"):  # parquet is read from its end, which gzip cannot
            path = Path(folder, "whole.parquet")
            with _open(file) as stream, path.open("wb") as whole:
                shutil.copyfileobj(stream, whole)
        try:
            pattern = glob.escape(str(path))
            rows = datasets.load_dataset(
                "parquet", data_files=[pattern], split="train", streaming=True, cache_dir=folder
            )
            for number, row in enumerate(rows, 1):
                yield Record(f"{file}:{number}", row)
        except (pa.ArrowException, OSError, ValueError) as error:
            what = str(error).partition("\n")[0]
            yield BadRecord(f"{file}:{number + 1}", f"is not readable as Parquet: {what}")


def describe(value: Any) -> str:
    """Return what people call a JSON value's type, with its article."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
