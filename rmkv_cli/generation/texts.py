"""A text of any length as a stream of pieces."""

import codecs
import io
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from rmkv_cli.errors import UserError
from rmkv_cli.files import HEAD, why_no_text

READ = 1 << 13  # bytes
LONGEST = 1 << 20  # characters that are held while no place to cut is found

CUT = re.compile(r".*(?:\S(?= )|[^\W_](?=\n))", re.DOTALL)


def text_pieces(file: BinaryIO, name: str, advance: Callable[[float], None] = lambda size: None) -> Iterator[str]:
    """Yield the text of a UTF-8 file, without a byte order mark, in pieces that hold little of it at once.

    It is cut where byte-level BPE cuts as well, before the space or the newline after a word, so that the pieces'
    tokens are the whole text's. Only a text without any such place is cut elsewhere, after `LONGEST` characters.
    `advance` is called with the number of bytes of which the piece before was made. Line ends are read as "\\n".

    Raises:
        UserError: the file, called `name`, is not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    text, offset = "", 0
    while data := file.read(READ):
        if not offset and (what := why_no_text(data[:HEAD])):
            raise UserError(f"{name}: {what}")
        new = lines.decode(_decode(decoder, data, offset, name))
        searched, text = max(len(text) - 1, 0), text + (new if offset else new.removeprefix("\ufeff"))
        cut = CUT.match(text, searched)
        end = cut.end() if cut else len(text) if len(text) >= LONGEST else 0
        if end:
            yield text[:end]
            text = text[end:]
        offset += len(data)
        advance(len(data))
    text += lines.decode(_decode(decoder, b"", offset, name), final=True)
    if text:
        yield text


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, offset: int, name: str) -> str:
    """Return the next text; `data` stands at `offset` of the file, no `data` is its end."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        at = offset + len(data) - len(error.object) + error.start
        raise UserError(f"{name}: is not valid UTF-8: byte {error.object[error.start]:#04x} at offset {at}") from None
