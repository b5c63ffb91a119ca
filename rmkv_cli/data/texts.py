"""Text in UTF-8 from a file: whole, or where it is long in parts, so that memory does not grow with it."""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import in_parts

PART = 1 << 20  # bytes that are read at once, and characters of a part


@dataclass(frozen=True)
class Part:
    """Which part of a text this is."""

    before: int
    """Bytes of the text that precede it."""
    total: int
    """Bytes of the whole text."""
    characters: int
    """Characters of the whole text."""
    reread: Callable[[], Iterator[str]]
    """Reads the whole text again."""


def read_text(
    stream: IO[bytes], start: int, reread: Callable[[], Iterator[str]]
) -> Iterator[tuple[int, str, Part | None]]:
    """Yield a text in parts from the one at byte `start` of the stream on, each with the byte where it begins.

    A text of at most PART bytes is yielded whole, without a `Part`. The tokens of the parts are those of the whole
    text. A longer text is read to its end first, so that nothing is yielded of one that is not valid.

    Raises:
        ValueError: it is no text in UTF-8; the message says why.
        UserError: it changed while it was read.
    """
    head = stream.read(PART + 1)
    if len(head) <= PART:
        yield 0, decode(head), None
        return
    mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    stream.seek(0)
    characters = sum(map(len, decoded(stream)))
    total = stream.tell() - mark
    stream.seek(start or mark)
    before = max(start - mark, 0)
    try:
        for text in in_parts(decoded(stream), PART):
            yield before + mark if before else 0, text, Part(before, total, characters, reread)
            before += len(text.encode())
    except ValueError:
        before = -1
    if before != total:
        raise UserError("changed while it was read")


def decode(data: bytes) -> str:
    """Return UTF-8 text without its byte order mark; raise `ValueError` saying what is wrong."""
    return _decode(data.removeprefix(codecs.BOM_UTF8), True, len(data) - len(data.removeprefix(codecs.BOM_UTF8)), 0)[0]


def decoded(stream: IO[bytes]) -> Iterator[str]:
    """Yield what is left of a stream as text, some at a time; raise `ValueError` as `decode` does."""
    rest, offset, lines = b"", stream.tell(), 0
    while data := stream.read(PART):
        data = rest + data
        if not offset and data.startswith(codecs.BOM_UTF8):
            offset, data = len(codecs.BOM_UTF8), data.removeprefix(codecs.BOM_UTF8)
        text, used = _decode(data, False, offset, lines)
        yield text
        offset += used
        lines += data.count(b"\n", 0, used)
        rest = data[used:]
    _decode(rest, True, offset, lines)


def _decode(data: bytes, final: bool, offset: int, lines: int) -> tuple[str, int]:
    """Return the text of bytes, at `offset` and after so many lines of their file, and how many of them it took.

    Unless they are the final ones, a character that is not complete is left.
    """
    if b"\0" in data:
        raise ValueError("holds a NUL byte, so it is no text file")
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        line = lines + data.count(b"\n", 0, error.start) + 1
        place = f" (line {line})" if line > 1 else ""
        raise ValueError(
            f"is not valid UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}{place}"
        ) from None
