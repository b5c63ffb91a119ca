"""Streaming decoding."""

import codecs
from collections.abc import Callable


class Stream:
    """Decodes ids one by one and returns only whole characters.

    The texts that `step` and then `end` return, joined, equal `Tokenizer.decode` of all the ids, except for the space
    that some tokenizers prepend to a text. (The library's own DecodeStream withholds a genuine U+FFFD, and whatever
    follows malformed bytes.)
    """

    def __init__(self, token_bytes: Callable[[int], bytes], spaced: bool = False) -> None:
        """Start a text; `token_bytes` returns a token's bytes. If `spaced`, drop a space at the beginning."""
        self._token_bytes, self._spaced = token_bytes, spaced
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """Return the text that this token completes; "" while a character is incomplete."""
        text = self._decoder.decode(self._token_bytes(token))
        if text and self._spaced:
            text, self._spaced = text.removeprefix(" "), False
        return text

    def end(self) -> str:
        """Return the remaining text: "" or, for the bytes of an incomplete character, U+FFFD."""
        return self._decoder.decode(b"", final=True)
