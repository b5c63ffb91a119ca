"""Read UTF-8 text from a file. A long text is read in parts, so that memory does not grow with the file."""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import in_parts

PART = 1 << 20  # bytes of one read, and characters of a part


@dataclass(frozen=True)
class Part:
    """The position of a part within its text."""

    before: int
    """Number of bytes of the text before this part."""
    total: int
    """Number of bytes of the whole text."""
    characters: int
    """Number of characters of the whole text."""
    reread: Callable[[], Iterator[str]]
    """Function that reads the whole text again."""


def read_text(
    stream: IO[bytes], start: int, reread: Callable[[], Iterator[str]]
) -> Iterator[tuple[int, str, Part | None]]:
    """Yield the parts of a text from byte `start` of the stream on, each with the byte where it begins.

    A text of at most PART bytes is yielded whole, without a `Part`. A longer text is read to its end before its first
    part, so that an invalid text yields nothing. The parts have the same tokens as the whole text.

    Raises:
        ValueError: the text is not valid UTF-8; the message says why.
        UserError: the text changed while it was read.
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
    """Yield the rest of a stream as text, piece by piece; raise `ValueError` as `decode` does."""
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
    """Decode bytes; return the text and the number of bytes used.

    `offset` and `lines` locate the bytes in their file, for messages. Unless the bytes are the final ones, an
    incomplete character at their end is left for the next call.
    """
    if b"\0" in data:
        raise ValueError("contains a NUL byte, so it is not a text file")
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        line = lines + data.count(b"\n", 0, error.start) + 1
        place = f" (line {line})" if line > 1 else ""
        raise ValueError(
            f"is not valid UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}{place}"
        ) from None
