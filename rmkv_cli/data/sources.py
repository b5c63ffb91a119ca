"""From a source's records to documents of untrusted text and special tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rmkv_cli.config import FileSource, MixConfig
from rmkv_cli.data.records import BadRecord, Record, describe, find_files, read_records
from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Piece, Special

GROUP_BYTES = 1 << 19
GROUP_DOCUMENTS = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A document before it is tokenized."""

    source: str
    """Name of its source."""
    pieces: tuple[Piece, ...]
    size: int
    """Bytes of its untrusted text in UTF-8."""


@dataclass
class Skipped:
    """How many of a source's records could not be read, and the first one's message."""

    records: int = 0
    first: str | None = None

    def __str__(self) -> str:
        return f"{self.records:,} bad record{'s' * (self.records != 1)} left out, the first: {self.first}"


def read_source(source: FileSource, base: Path) -> Iterator[Document | BadRecord]:
    """Return an iterator over a source's documents and its unreadable records, in the order of files and lines.

    Raises:
        UserError: at once, if a path or glob (relative to `base`) matches nothing, or what `find_files` refuses.
    """
    try:
        files = find_files(source.files, base)
    except UserError as error:
        raise UserError(f"source '{source.name}': {error}") from None
    columns = [source.text_column] if source.format == "text" else [source.prompt_column, source.response_column]

    def documents() -> Iterator[Document | BadRecord]:
        for record in read_records(files, source.text_column):
            yield record if isinstance(record, BadRecord) else _document(source, record, columns)

    return documents()


def good_documents(source: FileSource, base: Path, on_error: str) -> Iterator[Document]:
    """Return an iterator over the readable documents; how many were left out is said on stderr at the end.

    Raises:
        UserError: as in `read_source`, and on the way as in `refuse`.
    """
    items = read_source(source, base)

    def good() -> Iterator[Document]:
        skipped = Skipped()
        for item in items:
            if isinstance(item, BadRecord):
                refuse(item, source.name, on_error, skipped)
            else:
                yield item
        if skipped.records:
            stderr().print(f"source '{source.name}': {skipped}", style="yellow")

    return good()


def refuse(bad: BadRecord, source: str, on_error: str, skipped: Skipped) -> None:
    """Count a bad record in `skipped` if `on_error` is "skip".

    Raises:
        UserError: the record's place and fault, if `on_error` is "stop".
    """
    if on_error == "stop":
        raise UserError(
            f"{bad} (source '{source}'; on_error = \"skip\" above the mix's first [[sources]] leaves such records out)"
        )
    skipped.records += 1
    skipped.first = skipped.first or str(bad)


def mix_documents(mix: MixConfig, base: Path) -> Iterator[tuple[FileSource, Iterator[Document]]]:
    """Yield the sources of a mix that hold text, each with its documents; errors as in `good_documents`."""
    for source in mix.sources:
        if isinstance(source, FileSource):
            yield source, good_documents(source, base, mix.on_error)


def grouped(items: Iterator[T]) -> Iterator[list[T]]:
    """Yield documents, and bad records among them, in lists of a size that is worth tokenizing at once."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += item.size if isinstance(item, Document) else 0
        if size >= GROUP_BYTES or len(group) >= GROUP_DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _document(source: FileSource, record: Record, columns: list[str]) -> Document | BadRecord:
    for name in columns:
        if name not in record.columns:
            known = ", ".join(record.columns) or "none"
            hint = did_you_mean(name, record.columns) or "; text_column, or format, tells which to read"
            return BadRecord(record.where, f"has no column '{name}' (it has: {known}){hint}")
        value = record.columns[name]
        if not isinstance(value, str):
            return BadRecord(record.where, f"column '{name}' is not a string but {describe(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            what = f"byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
            return BadRecord(record.where, f"column '{name}' is not valid UTF-8: {what} at character {error.start + 1}")
    pieces: tuple[Piece, ...] = tuple(record.columns[name] for name in columns)
    if source.format == "prompt_response":
        pieces = (Special.START, pieces[0], Special.END, *_response(pieces[1]))
    return Document(source.name, pieces, sum(len(p.encode()) for p in pieces if not isinstance(p, Special)))


def _response(text: str) -> tuple[Piece, ...]:
    """Return a response's pieces: a thought that it begins with is set between the special tokens."""
    opened, closed, answer = text.lstrip().partition(Special.END_THINK.value)
    if closed and opened.startswith(Special.THINK.value):
        return (Special.THINK, opened.removeprefix(Special.THINK.value), Special.END_THINK, answer)
    return (text,)
