"""Stream a text of any length in pieces."""

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from rmkv_cli.errors import UserError
from rmkv_cli.files import HEAD, text_fault
from rmkv_cli.tokenizer import in_parts

READ = 1 << 13  # bytes per read, and characters per piece
LONGEST = 1 << 20  # characters buffered while there is no place to split


def text_pieces(
    file: BinaryIO,
    name: str,
    advance: Callable[[float], None] = lambda size: None,
    parts: Callable[[Iterable[str], int, int], Iterator[str]] = in_parts,
) -> Iterator[str]:
    """Yield the text of a UTF-8 file in small pieces, without its byte order mark.

    The pieces encode to the same tokens as the whole text if `parts` belongs to the tokenizer. The exception is text
    without any place to split, which is split after `LONGEST` characters. `advance` is called with the number of bytes
    read, once their pieces are consumed. All line ends become "\\n".

    Raises:
        UserError: the file, called `name`, is not UTF-8 text.
    """
    return parts(_decoded(file, name, advance), READ, LONGEST)


def _decoded(file: BinaryIO, name: str, advance: Callable[[float], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    while data := file.read(READ):
        if not offset and (what := text_fault(data[:HEAD])):
            raise UserError(f"{name}: {what}")
        text = lines.decode(_decode(decoder, data, offset, name))
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(data)
        advance(len(data))
    yield lines.decode(_decode(decoder, b"", offset, name), final=True)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, offset: int, name: str) -> str:
    """Return the text of `data`, which begins at `offset` of the file; empty `data` means the end."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        at = offset + len(data) - len(error.object) + error.start
        raise UserError(f"{name}: is not valid UTF-8: byte {error.object[error.start]:#04x} at offset {at}") from None
