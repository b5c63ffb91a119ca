"""Convert a source's records to documents of untrusted text and special tokens."""

import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rmkv_cli.config import FileSource, HubSource, MixConfig, Supervise, TextSource
from rmkv_cli.data.blocks import BadRecord, Record
from rmkv_cli.data.chat import Turn, read_messages, render, without_empty_prompts
from rmkv_cli.data.files import NO_RECORDS, find_files
from rmkv_cli.data.order import Place, ordered
from rmkv_cli.data.records import RECORDS, File, describe, suffix, unzipped
from rmkv_cli.data.texts import Part, decoded
from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.files import HEAD, text_fault
from rmkv_cli.progress import plural, stderr
from rmkv_cli.tokenizer import CONTINUED, Piece, Token, Tokenizer

LONG = 1 << 16
"""Bytes above which a text is read in parts if only its beginning is needed."""
MAX_FIRST_BAD = 1000
"""Number of bad records before any good one after which the source's config must be wrong, not its records."""


@dataclass(frozen=True)
class Document:
    """A document before tokenization, or one part of a long document."""

    source: str
    """Name of its source."""
    pieces: tuple[Piece, ...]
    size: int
    """Number of bytes of its untrusted text in UTF-8."""
    part: Part | None = None
    """Position of this part in its document; None for a whole document."""
    learned: tuple[bool, ...] | None = None
    """Flags for the pieces and the document's end: do they count in the loss (see `render`)? None: all do."""

    @property
    def first(self) -> bool:
        """Whether this is a document's first part, or all of it."""
        return self.part is None or self.part.before == 0

    @property
    def placed(self) -> tuple[Piece, ...]:
        """Pieces of the document; those of a later part are preceded by the piece `CONTINUED`."""
        return self.pieces if self.first else (CONTINUED, *self.pieces)

    @property
    def last(self) -> bool:
        """Whether this is a document's last part, or all of it."""
        return self.part is None or self.part.before + self.size == self.part.total


@dataclass(frozen=True)
class LeftOut:
    """A record that its source's config excludes."""


Item: TypeAlias = Document | BadRecord | LeftOut


@dataclass
class Skipped:
    """Number of a source's records that could not be read, and the first one's message."""

    records: int = 0
    first: str | None = None

    def __str__(self) -> str:
        return f"{plural(self.records, 'bad record')} left out, the first: {self.first}"


def open_source(source: TextSource, base: Path) -> list[File]:
    """Return a source's files; local ones are relative to `base`.

    Raises:
        UserError: as in `find_files` and `find_hub_files`.
    """
    try:
        if isinstance(source, FileSource):
            return find_files(source.files, base)
        assert isinstance(source, HubSource)
        from rmkv_cli.data.hub import find_hub_files

        return find_hub_files(source)
    except UserError as error:
        raise UserError(f"source '{source.name}': {error}") from None


def read_source(
    source: TextSource,
    files: Sequence[File],
    seed: Sequence[int] | None = None,
    place: Place | None = None,
    supervise: Supervise = "all",
    tokenizer: Tokenizer | None = None,
) -> Iterator[tuple[Place, Item]]:
    """Yield one epoch of a source: documents, excluded records and bad records, each with the place after it.

    The parts of a long document follow one another.

    Args:
        source: the source's config.
        files: the source's files.
        seed: the seed of their order; without it they keep their order.
        place: where to start; without it, at the first record.
        supervise: which tokens of a conversation are learned.
        tokenizer: determines the format of conversations; without it, rmkv's own format.

    Raises:
        UserError: the first thousand records are all bad, so the source's config must be wrong.
    """
    columns = _columns(source)
    filters = [*source.where, *source.at_least, *source.at_most]
    bad = 0 if place in (None, Place()) else None  # number of bad records so far; None after the first good one
    first = ""
    for after, record in ordered(files, [*columns, *filters], seed, place or Place()):
        item = record if isinstance(record, BadRecord) else _item(source, record, columns, supervise, tokenizer)
        if item is None:
            continue
        if bad is not None and isinstance(item, BadRecord):
            bad, first = bad + 1, first or str(item)
            if bad == MAX_FIRST_BAD:
                raise UserError(
                    f"{first} (source '{source.name}'; the next {MAX_FIRST_BAD - 1} records cannot be read either)"
                )
        else:
            bad = None
        yield after, item


def good_documents(
    source: TextSource,
    base: Path,
    on_error: str,
    seed: Sequence[int] | None = None,
    supervise: Supervise = "all",
    tokenizer: Tokenizer | None = None,
) -> Iterator[Document]:
    """Return an iterator over a source's documents, which prints the number of unreadable records at the end.

    Raises:
        UserError: as in `open_source`; the iterator raises it as `skip_or_raise` does.
    """
    files = open_source(source, base)

    def good() -> Iterator[Document]:
        skipped = Skipped()
        for _, item in read_source(source, files, seed, supervise=supervise, tokenizer=tokenizer):
            if isinstance(item, BadRecord):
                skip_or_raise(item, source.name, on_error, skipped)
            elif isinstance(item, Document):
                yield item
        if skipped.records:
            stderr().print(f"source '{source.name}': {skipped}", style="yellow")

    return good()


def is_long_text(path: Path) -> bool:
    """Return whether a file is a text that should be read in parts to save memory."""
    return path.is_file() and path.stat().st_size > LONG and suffix(path.name) not in RECORDS | NO_RECORDS


def text_documents(path: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield a text file as the parts of one document, reading only as far as the caller iterates.

    Raises:
        UserError: the file is not UTF-8 text.
    """
    with path.open("rb") as raw:
        before = 0
        try:
            stream = unzipped(path.name, raw)
            if what := text_fault(stream.read(HEAD)):
                raise ValueError(what)
            stream.seek(0)
            for text in tokenizer.parts(decoded(stream), LONG):
                size = len(text.encode())
                yield Document(str(path), (text,), size, Part(before, sys.maxsize, sys.maxsize, lambda: iter(())))
                before += size
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: {error}") from None


def skip_or_raise(bad: BadRecord, source: str, on_error: str, skipped: Skipped) -> None:
    """Count a bad record in `skipped` if `on_error` is "skip", and print it if it stands for several records.

    Raises:
        UserError: the record's location and fault, if `on_error` is "stop".
    """
    if on_error == "stop":
        raise UserError(
            f"{bad} (source '{source}'; to skip bad records, set on_error = \"skip\" above the mix's first [[sources]])"
        )
    skipped.records += bad.records
    skipped.first = skipped.first or str(bad)
    if bad.records > 1:
        stderr().print(f"source '{source}': {bad}", style="yellow")


def mix_documents(
    mix: MixConfig, base: Path, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[TextSource, Iterator[Document]]]:
    """Yield the text sources of a mix, each with its documents; errors as in `good_documents`."""
    for index, source in enumerate(mix.sources):
        if isinstance(source, TextSource):
            options = mix.on_error, [mix.seed, index], mix.supervision(source), tokenizer
            yield source, good_documents(source, base, *options)


def _columns(source: TextSource) -> list[str]:
    match source.format:
        case "text":
            return [source.text_column]
        case "prompt_response":
            return [source.prompt_column, source.response_column]
    return [source.messages_column, *([source.answer_column] if source.answer_column else [])]


def _item(
    source: TextSource, record: Record, columns: list[str], supervise: Supervise, tokenizer: Tokenizer | None
) -> Item | None:
    """Return the item of a record; None for a later part of a text whose first part gave the item of the whole."""
    part = record.part
    if part is None:
        return _whole_item(source, record, columns, supervise, tokenizer)
    if source.format != "text":  # turns are found in the whole text
        if part.before:
            return None
        record = Record(record.where, {columns[0]: "".join(part.reread())})
        return _whole_item(source, record, columns, supervise, tokenizer)
    item = _whole_item(source, record, columns, supervise, tokenizer)
    return None if part.before and not isinstance(item, Document) else item


def _whole_item(
    source: TextSource, record: Record, columns: list[str], supervise: Supervise, tokenizer: Tokenizer | None
) -> Item:
    pieces: tuple[Piece, ...]
    learned = None
    try:
        if not _is_wanted(source, record.columns):
            return LeftOut()
        values = [_column(record.columns, name) for name in columns]
        if source.format == "text":
            pieces = (_text(values[0], columns[0]),)
        else:
            turns = (_messages if source.format == "messages" else _prompt_and_response)(values, columns)
            pieces, learned = render(turns, supervise == "answers", tokenizer)
    except ValueError as error:
        return BadRecord(record.where, str(error))
    texts = [piece for piece in pieces if not isinstance(piece, Token)]
    length = record.part.characters if record.part else sum(map(len, texts))
    if length < source.min_characters or length > (source.max_characters or length):
        return LeftOut()
    return Document(source.name, pieces, sum(len(text.encode()) for text in texts), record.part, learned)


def _prompt_and_response(values: list[Any], columns: list[str]) -> list[Turn]:
    prompt, response = (_text(value, name) for name, value in zip(columns, values, strict=True))
    return [Turn("user", prompt), Turn("assistant", response)]


def _messages(values: list[Any], columns: list[str]) -> list[Turn]:
    try:
        turns = read_messages(values[0])
    except ValueError as error:
        raise ValueError(f"column '{columns[0]}' {error}") from None
    turns = [turn._replace(content=_text(turn.content, columns[0])) for turn in turns]
    answers = [Turn("assistant", _text(value, name)) for value, name in zip(values[1:], columns[1:], strict=True)]
    return without_empty_prompts(turns + answers)


def _is_wanted(source: TextSource, columns: dict[str, Any]) -> bool:
    def number(name: str) -> float:
        value = _column(columns, name)
        if isinstance(value, str):  # csv files have no numbers
            try:
                return float(value)
            except ValueError:
                pass
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"column '{name}' is not a number but {describe(value)}")
        return value

    def is_one_of(name: str, values: list[Any]) -> bool:
        value = _column(columns, name)
        return value in values or (isinstance(value, str) and value in map(str, values))

    return (
        all(is_one_of(name, values) for name, values in source.where.items())
        and all(number(name) >= least for name, least in source.at_least.items())
        and all(number(name) <= most for name, most in source.at_most.items())
    )


def _column(columns: dict[str, Any], name: str) -> Any:
    if name not in columns:
        known = ", ".join(columns) or "none"
        hint = did_you_mean(name, columns) or "; set the source's *_column or format"
        raise ValueError(f"has no column '{name}' (it has: {known}){hint}")
    return columns[name]


def _text(value: Any, name: str) -> str:
    """Return a column's text; raise `ValueError` if it is not valid text."""
    if not isinstance(value, str):
        raise ValueError(f"column '{name}' is not a string but {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        what = f"byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
        raise ValueError(f"column '{name}' is not valid UTF-8: {what} at character {error.start + 1}") from None
    return value
