"""A trained tokenizer: text to ids and back, exactly."""

import codecs
import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from rmkv_cli.errors import UserError
from rmkv_cli.files import read_whole, write_text
from rmkv_cli.tokenizer.parts import in_parts
from rmkv_cli.tokenizer.special import Piece, Special

FILE = "tokenizer.json"
LARGEST = 1 << 30  # bytes of a file; the largest vocabulary of `train_tokenizer`, 2^24, takes less
PART, BATCH = 1 << 16, 1 << 19  # characters; encoding takes 130 bytes of memory per byte of text
PROBE = "".join(map(chr, range(256))) + " Ünïcödé, 日本語 \U0001f600  <eod>\r\n\t"
"""Text that a valid tokenizer must encode and decode without loss."""


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (Radford et al., 2019, GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


class Tokenizer:
    """Byte-level BPE over the `tokenizers` library: decode(encode(text)) == text for every text.

    Some programs leave truncation, padding and dropout in the file. These are disabled, so that encoding is complete
    and deterministic.

    Raises:
        UserError: the library's tokenizer lacks rmkv's special tokens, has gaps in its ids, is not byte-level, or does
            not decode what it encodes to the same text.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        if any(library.token_to_id(special) != special.id for special in Special):
            wanted = ", ".join(f"{special} = {special.id}" for special in Special)
            raise UserError(f"lacks the special tokens with their ids ({wanted}); `rmkv tokenizer train` makes one")
        library.add_special_tokens(list(map(str, Special)))  # in an exported file <think> is not special
        library.encode_special_tokens = True  # text that spells a special token stays text; the file does not keep this
        if not isinstance(library.model, tokenizers.models.BPE):
            raise UserError("is not a byte-level tokenizer (its model is not BPE)")
        library.no_truncation()
        library.no_padding()
        library.model.dropout = None
        ids = sorted(library.get_vocab().values())
        if ids != list(range(len(ids))):
            raise UserError(f"its {len(ids):,} tokens should have the ids 0 to {len(ids) - 1:,}, each once")
        self._library = library
        self._bytes = [self._to_bytes(token) for token in ids]
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                "does not decode its own encoding to the same text; `rmkv tokenizer train` makes one that does"
            )

    def _to_bytes(self, token: int) -> bytes:
        spelling = self._library.id_to_token(token) or ""
        if token < len(Special):
            return spelling.encode()
        try:
            return bytes(_BYTES[character] for character in spelling)
        except KeyError:
            raise UserError(f"is not a byte-level tokenizer (its token {token} is {spelling!r})") from None

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder; raise `UserError` if it is absent, broken or not ours."""
        file = path / FILE if path.is_dir() else path
        data = read_whole(file, LARGEST)
        try:
            return cls.from_json(data.decode("utf-8"))
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Return the tokenizer that `to_json` described; raise `UserError` if the text is none."""
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"is not a tokenizer file: {error!s:.300}") from None
        return cls(library)

    def to_json(self) -> str:
        """Return the tokenizer in its canonical serialisation, a tokenizer.json."""
        return self._library.to_str()

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, whole or not at all; into `path` itself, or into it if it is a folder."""
        write_text(path / FILE if path.is_dir() else path, self.to_json())

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones among them."""
        return len(self._bytes)

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""
        return Special.EOD.id

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical serialisation, in hexadecimal: the same after saving and loading."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of untrusted text; raise `UserError` if it holds a lone surrogate."""
        return self._encode([text])[0].tolist()

    def encode_document(self, pieces: Sequence[Piece]) -> list[int]:
        """Return [EOD] and the ids of the pieces; errors as in `encode`.

        Every document begins with the end-of-document token, so that its first real token is predicted too. The token
        is not repeated at the end: there it is a target only.
        """
        return self.encode_documents([pieces])[0]

    def encode_documents(self, documents: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Return `encode_document` of each, computed together, which is faster."""
        return [ids.tolist() for ids in self.encode_arrays(documents)]

    def encode_arrays(self, documents: Sequence[Sequence[Piece]]) -> list[array]:
        """Return the ids of `encode_documents` as array("I"), which takes a ninth of the memory."""
        return [ids for ids, _ in self.encode_pieces(documents)]

    def encode_pieces(self, documents: Sequence[Sequence[Piece]]) -> Iterator[tuple[array, list[int]]]:
        """Yield each document's ids, as `encode_arrays` returns them, and how many of them each piece has."""
        texts = iter(self._encode([p for pieces in documents for p in pieces if not isinstance(p, Special)]))
        for pieces in documents:
            ids, lengths = array("I", [self.eod]), []
            for piece in pieces:
                encoded = array("I", [piece.id]) if isinstance(piece, Special) else next(texts)
                ids += encoded
                lengths.append(len(encoded))
            yield ids, lengths

    def _encode(self, texts: Sequence[str]) -> list[array]:
        """Return the ids of each text, encoded in parts, so that memory is bounded for texts of any length."""
        encoded = [array("I") for _ in texts]
        try:
            for batch in _batches(texts):
                found = self._library.encode_batch_fast([part for _, part in batch], add_special_tokens=False)
                for (number, _), encoding in zip(batch, found, strict=True):
                    encoded[number].extend(encoding.ids)
        except TypeError:  # what the library makes of a lone surrogate
            for text in texts:
                require_unicode(text)
            raise
        return encoded

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that an id stands for; for a special token, its spelling.

        Raises:
            UserError: no such id.
        """
        if not 0 <= token < len(self._bytes):
            raise UserError(f"{token} is no token of this tokenizer; its ids are 0 to {len(self._bytes) - 1}")
        return self._bytes[token]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; special tokens are spelt out, malformed UTF-8 becomes U+FFFD.

        Raises:
            UserError: an id is out of range.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def pieces(self, ids: Sequence[int]) -> tuple[Piece, ...]:
        """Return the text of the ids with the special tokens apart; errors and malformed UTF-8 as in `decode`."""
        runs = itertools.groupby(ids, lambda token: token if token < len(Special) else None)
        pieces: list[Piece] = []
        for special, run in runs:
            pieces += [self.decode(list(run))] if special is None else [list(Special)[token] for token in run]
        return tuple(pieces)

    def stream(self) -> "Stream":
        """Return a decoder that is given one id after the other."""
        return Stream(self)


def require_unicode(text: str) -> None:
    """Raise `UserError` if the text holds a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start + 1} of the text is a lone surrogate ({text[error.start]!a}), which is no valid "
            "Unicode"
        ) from None


class Stream:
    """Decodes ids as they come; characters appear whole.

    What `step` returned, joined, and then `end`, is exactly `Tokenizer.decode` of all the ids. (The library's own
    DecodeStream withholds a true U+FFFD, and what follows malformed bytes.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """Return the new text that this token completes: "" while a character's bytes are not all there."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """Return what is left at the end: "" or, for the bytes of an unfinished character, U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield parts of the texts, each with its text's index, in lists of about BATCH characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        for part in in_parts([text], PART):
            batch.append((number, part))
            size += len(part)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


_BYTES = _bytes_of_characters()
