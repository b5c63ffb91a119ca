"""The tokenizer, which converts text to ids and back."""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from rmkv_cli.errors import UserError
from rmkv_cli.files import read_whole, write_text
from rmkv_cli.tokenizer.foreign import CONFIG, GENERATION, MAP, Foreign, read_foreign
from rmkv_cli.tokenizer.parts import in_parts
from rmkv_cli.tokenizer.rmkv_format import is_rmkv_tokenizer, rmkv_token_bytes
from rmkv_cli.tokenizer.special import BARE, CONTINUED, RMKV_ROLES, Piece, Roles, Special, Token
from rmkv_cli.tokenizer.stream import Stream

if TYPE_CHECKING:
    from rmkv_cli.tokenizer.template import Template

FILE, TEMPLATE = "tokenizer.json", "chat_template.jinja"
FILES = FILE, CONFIG, MAP, GENERATION, TEMPLATE
"""Files of a pretrained model's tokenizer. An rmkv tokenizer has only the first."""
LARGEST = 1 << 30  # bytes of a file; the largest vocabulary of `train_tokenizer`, 2^24, takes less
PART, BATCH = 1 << 16, 1 << 19  # characters; encoding takes 130 bytes of memory per byte of text
PROBE = "".join(map(chr, range(256))) + " Ünïcödé, 日本語 \U0001f600  <eod>\r\n\t"
"""Text that a valid tokenizer must encode and decode without loss."""


class Tokenizer:
    """BPE tokenizer based on the `tokenizers` library: one of rmkv's own or a pretrained model's.

    rmkv's own tokenizers are byte-level and lossless: decode(encode(text)) == text for every text. A pretrained model's
    tokenizer is used unchanged, with its special tokens and its chat template.

    Some programs leave truncation, padding and dropout in the file. These are disabled, so that encoding is complete
    and deterministic.

    Args:
        library: the tokenizer.
        foreign: the description of a pretrained model's tokenizer; None for one of rmkv's own.
        template: its chat template, if it has one.
        files: the contents of the files that `save` writes, by name; empty for one of rmkv's own.

    Raises:
        UserError: one of rmkv's own lacks rmkv's special tokens, has gaps in its ids, is not byte-level, or does not
            decode its own encoding to the same text; or the template is broken.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        foreign: Foreign | None = None,
        template: str | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self._library = library
        self._files = dict(files or {})
        self.foreign = foreign
        self.roles: Roles = RMKV_ROLES
        """Roles of its special tokens."""
        self.tokens: Mapping[int, Token] = {special.id: special for special in Special}
        """Its special tokens by id."""
        self.template: Template | None = None
        """Its chat template. None: conversations are in rmkv's own format (see `rmkv_cli.data.chat`)."""
        self._libraries = library, library, library
        if foreign is None:
            self._bytes = rmkv_token_bytes(library)
            if self.decode(self.encode(PROBE)) != PROBE:
                raise UserError(
                    "does not decode its own encoding to the same text; `rmkv tokenizer train` makes one that does"
                )
        else:
            self._libraries, self._bytes = foreign.libraries, foreign.bytes
            self.tokens, self.roles = foreign.tokens, foreign.roles
        if template is not None:
            from rmkv_cli.tokenizer import template as templates  # imports jinja2, which only templates need

            named, strips = (foreign.named, foreign.strips) if foreign else ({}, {})
            self.template = templates.Template(template, list(self.tokens.values()), self.roles, named, strips)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_files, ({FILE: self.to_json(), **self._files},)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder, and the other files of a pretrained model's tokenizer.

        Raises:
            UserError: the tokenizer is absent, broken or not supported.
        """
        file = path / FILE if path.is_dir() else path
        data = read_whole(file, LARGEST)
        try:
            library = _library(text := data.decode("utf-8"))
            # The other files beside an rmkv tokenizer were written for other programs.
            names = [TEMPLATE] if is_rmkv_tokenizer(library) else FILES[1:]
            found = {name: read_whole(file.parent / name) for name in names if (file.parent / name).is_file()}
            return cls._of(library, {FILE: text} | {name: content.decode("utf-8") for name, content in found.items()})
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {error}") from None

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> "Tokenizer":
        """Return the tokenizer for the contents of `FILES` (the first is required); errors as in `load`."""
        return cls._of(_library(files[FILE]), files)

    @classmethod
    def _of(cls, library: tokenizers.Tokenizer, files: Mapping[str, str]) -> "Tokenizer":
        """Return the tokenizer for these files; `library` was read from the first."""
        template = files.get(TEMPLATE)
        if is_rmkv_tokenizer(library) or not files.keys() & {CONFIG, MAP}:
            return cls(library, None, template, {} if template is None else {TEMPLATE: template})
        config, generation, names = (_object(name, files.get(name, "{}")) for name in (CONFIG, GENERATION, MAP))
        foreign = read_foreign(library, files[FILE], names | config, generation)
        return cls(library, foreign, template or default_template(config), files)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Return one of rmkv's own tokenizers from the text of `to_json`; raise `UserError` if the text is invalid."""
        return cls.from_files({FILE: text})

    def to_json(self) -> str:
        """Return the content of its tokenizer.json: canonical for rmkv's own, unchanged for others."""
        return self._files[FILE] if FILE in self._files else self._library.to_str()

    def save(self, path: Path) -> None:
        """Write a tokenizer.json atomically, to `path` or, if that is a folder, into it.

        The other files of a pretrained model's tokenizer go into the same folder.
        """
        folder = path if path.is_dir() else path.parent
        for name in self._files.keys() - {FILE, GENERATION}:
            write_text(folder / name, self._files[name])
        if self.foreign:
            write_text(folder / GENERATION, json.dumps(self.generation_ids(), indent=2) + "\n")
        write_text(path / FILE if path.is_dir() else path, self.to_json())

    def generation_ids(self) -> dict[str, Any]:
        """Return the special-token entries of a generation_config.json."""
        if not self.foreign:
            return {"bos_token_id": self.eod, "eos_token_id": self.eod}
        roles, ends = self.roles, [token.id for token in self.roles.ends]
        ids = {"bos_token_id": roles.begin, "pad_token_id": roles.pad}
        return {"eos_token_id": ends[0] if len(ends) == 1 else ends} | {
            name: token.id for name, token in ids.items() if token is not None
        }

    @property
    def vocab_size(self) -> int:
        """Number of ids, including special tokens."""
        return len(self._bytes)

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""
        return self.roles.eod.id

    @property
    def opening(self) -> int:
        """Id of the token before content that is not text: the token that begins a text, or else end-of-document."""
        return (self.roles.begin or self.roles.eod).id

    @cached_property
    def text_ids(self) -> range:
        """The longest run of ids without a special token."""
        borders = [-1, *sorted(self.tokens), self.vocab_size]
        runs = [range(before + 1, after) for before, after in itertools.pairwise(borders)]
        return max(runs, key=len)

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of everything that determines a document's ids; saving and loading preserve it."""
        described = [self.to_json()]
        if self.foreign:
            roles = self.generation_ids(), self.roles.eod, self.foreign.named
            described.append(json.dumps(roles, sort_keys=True))
        if self.template is not None:
            described.append(self.template.source)
        return hashlib.sha256("\0".join(described).encode()).hexdigest()

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Return the ids of untrusted text; raise `UserError` if it contains a lone surrogate.

        With `continues` the text follows another text, so that no tokenizer prepends a space.
        """
        return self._encode([(text, 2 if continues else 0)])[0].tolist()

    def encode_document(self, pieces: Sequence[Piece]) -> list[int]:
        """Return the ids of a document: its beginning and those of the pieces; errors as in `encode`.

        With rmkv's own tokenizers every document begins with the end-of-document token, so that its first real token is
        predicted too. The token is not repeated at the end: there it is only a target. With a pretrained model's
        tokenizer, a text begins as in that model, with its BOS token or with none. A document without any token becomes
        the end-of-document token alone.
        """
        return self.encode_documents([pieces])[0]

    def encode_documents(self, documents: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Return `encode_document` of each document, computed as a batch, which is faster."""
        return [ids.tolist() for ids in self.encode_arrays(documents)]

    def encode_arrays(self, documents: Sequence[Sequence[Piece]]) -> list[array]:
        """Return the ids of `encode_documents` as array("I"), which needs a ninth of the memory."""
        return [ids for ids, _ in self.encode_pieces(documents)]

    def encode_pieces(self, documents: Sequence[Sequence[Piece]]) -> Iterator[tuple[array, list[int]]]:
        """Yield each document's ids, as `encode_arrays` returns them, and the number of ids per piece."""
        texts = iter(self._encode([text for pieces in documents for text in _placed(pieces)]))
        for pieces in documents:
            begin = self._beginning(pieces[0] if pieces else "")
            ids, lengths = array("I", begin), []
            for piece in pieces:
                encoded = array("I", [piece.id][: piece.id >= 0]) if isinstance(piece, Token) else next(texts)
                ids += encoded
                lengths.append(len(encoded))
            if not ids and not (pieces and isinstance(pieces[0], Token) and pieces[0].id == CONTINUED.id):
                ids.append(self.eod)
            yield ids, lengths

    def encode_stream(self, pieces: Iterable[Piece], after: bool = False) -> Iterator[list[int]]:
        """Yield the ids of `encode_document` piece by piece; errors as in `encode`.

        With `after` the pieces follow another text.
        """
        place, empty = 2 if after else None, True
        for piece in itertools.chain(pieces, [None]):
            ids: list[int] = []
            if place is None:
                ids, place = self._beginning("" if piece is None else piece), 0
            if isinstance(piece, Token):
                ids, place = [*ids, *[piece.id][: piece.id >= 0]], 1 if piece.id >= 0 else place
            elif piece:
                ids, place = [*ids, *self._encode([(piece, place)])[0]], 2
            elif piece is None and empty and not after and not ids:
                ids = [self.eod]
            empty = empty and not ids
            if ids:
                yield ids

    def _beginning(self, first: Piece) -> list[int]:
        """Return the ids before a document's first piece."""
        bare = isinstance(first, Token) and first.id < 0
        return [] if bare or self.roles.begin is None else [self.roles.begin.id]

    def parts(self, texts: Iterable[str], length: int, longest: int = 1 << 62) -> Iterator[str]:
        """Yield the concatenation of texts in parts that encode to the same tokens; see `in_parts`."""
        return (
            in_parts(texts, length, longest, self.foreign.places) if self.foreign else in_parts(texts, length, longest)
        )

    def _encode(self, texts: Sequence[tuple[str, int]]) -> list[array]:
        """Return the ids of each text at its place, encoded in parts, so that memory is bounded for any length.

        A place is 0 at a document's beginning, 1 after a special token, 2 within a text.
        """
        encoded = [array("I") for _ in texts]
        try:
            for batch in self._batches(texts):
                for place in {place for *_, place in batch}:
                    parts = [(number, part) for number, part, part_place in batch if part_place == place]
                    encodings = self._libraries[place].encode_batch_fast(
                        [part for _, part in parts], add_special_tokens=False
                    )
                    for (number, _), encoding in zip(parts, encodings, strict=True):
                        encoded[number].extend(encoding.ids)
        except TypeError:  # the library's reaction to a lone surrogate
            for text, _ in texts:
                require_unicode(text)
            raise
        return encoded

    def _batches(self, texts: Sequence[tuple[str, int]]) -> Iterator[list[tuple[int, str, int]]]:
        """Yield parts of the texts, each with its text's index and place, in batches of about BATCH characters."""
        batch: list[tuple[int, str, int]] = []
        size = 0
        for number, (text, place) in enumerate(texts):
            for part in self.parts([text], PART):
                batch.append((number, part, place if self.foreign else 0))
                place = 2
                size += len(part)
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of an id; for a special token, its spelling; b"" for an id without a token.

        Raises:
            UserError: the id is out of range.
        """
        if not 0 <= token < len(self._bytes):
            raise UserError(f"{token} is not a token id of this tokenizer; its ids are 0 to {len(self._bytes) - 1}")
        return self._bytes[token]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; special tokens are spelt out, malformed UTF-8 becomes U+FFFD.

        The space that some tokenizers prepend to a document's text is removed.

        Raises:
            UserError: an id is out of range.
        """
        return self.text_bytes(ids).decode("utf-8", "replace")

    def text_bytes(self, ids: Sequence[int], place: int = 0) -> bytes:
        """Return the bytes of the text that `decode` returns; with `place` 1, of text after a special token."""
        text = b"".join(map(self.token_bytes, ids))
        return text.removeprefix(b" ") if self.foreign and self.foreign.spaced[place] else text

    def pieces(self, ids: Sequence[int]) -> tuple[Piece, ...]:
        """Return the text of the ids, split at special tokens; errors and malformed UTF-8 as in `decode`."""
        runs = itertools.groupby(ids, lambda token: token if token in self.tokens else None)
        pieces: list[Piece] = []
        for special, run in runs:
            if special is None:
                text = self.text_bytes(list(run), 1 if pieces else 0)
                pieces.append(text.decode("utf-8", "replace"))
            else:
                pieces += [self.tokens[token] for token in run]
        return tuple(pieces)

    def stream(self, answer: bool = False) -> Stream:
        """Return a streaming decoder for a text that follows others or, with `answer`, for an answer.

        The space that some tokenizers prepend to an answer is removed.
        """
        return Stream(self.token_bytes, answer and self.foreign is not None and any(self.foreign.spaced))


def require_unicode(text: str) -> None:
    """Raise `UserError` if the text contains a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start + 1} of the text is a lone surrogate ({text[error.start]!a}), which is not valid "
            "Unicode"
        ) from None


def _library(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"is not a tokenizer file: {error!s:.300}") from None


def default_template(config: Mapping[str, Any]) -> str | None:
    """Return the chat template in a tokenizer_config.json; if there are several, the one named default."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
    return found if isinstance(found, str) else None


def _placed(pieces: Sequence[Piece]) -> Iterator[tuple[str, int]]:
    """Yield the texts of a document, each with its place (see `Tokenizer._encode`)."""
    place = 0
    for piece in pieces:
        if isinstance(piece, Token):
            place = 2 if piece.id == CONTINUED.id else 0 if piece.id == BARE.id else 1
        else:
            yield piece, place
            place = 2 if piece else place


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} beside it is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} beside it is not a JSON object")
    return value
