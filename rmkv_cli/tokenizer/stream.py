"""Decoding ids as they come."""

import codecs
from collections.abc import Callable


class Stream:
    """Decodes ids as they come; characters appear whole.

    What `step` returned, joined, and then `end`, is exactly `Tokenizer.decode` of all the ids, but for the space that
    some tokenizers put before a text. (The library's own DecodeStream withholds a true U+FFFD, and what follows
    malformed bytes.)
    """

    def __init__(self, token_bytes: Callable[[int], bytes], spaced: bool = False) -> None:
        """Begin a text of tokens with these bytes; if it is `spaced`, a space at its beginning is dropped."""
        self._token_bytes, self._spaced = token_bytes, spaced
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """Return the new text that this token completes: "" while a character's bytes are not all there."""
        text = self._decoder.decode(self._token_bytes(token))
        if text and self._spaced:
            text, self._spaced = text.removeprefix(" "), False
        return text

    def end(self) -> str:
        """Return what is left at the end: "" or, for the bytes of an unfinished character, U+FFFD."""
        return self._decoder.decode(b"", final=True)
