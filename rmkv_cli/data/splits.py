"""Assign text to the splits: short documents are held out whole, long ones give their last part."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from rmkv_cli.config import MixConfig, TextSource
from rmkv_cli.data.blocks import BadRecord
from rmkv_cli.data.sources import Document, LeftOut
from rmkv_cli.tokenizer import CONTINUED, Piece, Token

LONG = 1 << 16
"""Minimum bytes of a document that gives a held-out stretch."""
SHORTEST = 512
"""Minimum bytes of a stretch."""
NEAR = 4096
"""Number of characters before the target in which to look for a line end."""
T = TypeVar("T")


@dataclass(frozen=True)
class Assigned:
    """A document or one part of a long document, with its split."""

    document: Document
    held_out: bool
    digest: int | None = None
    """Hash of the text and the mix's seed, 0 to 2^64 - 1. None for later parts and held-out stretches of the previous
    document, and where nothing depends on it."""
    continues: bool = False
    """Whether this part continues the previous one."""
    more: bool = False
    """Whether another part of the document follows."""
    stretch: bool = False
    """Whether this is a document's last training part, followed by its held-out stretch."""

    @property
    def placed(self) -> tuple[Piece, ...]:
        """The document's pieces; those of a part that continues the previous one are preceded by `CONTINUED`."""
        return (CONTINUED, *self.document.pieces) if self.continues else self.document.pieces


def digest(seed: int, *parts: bytes) -> int:
    """Return a hash, from 0 to 2^64 - 1, of a document's parts and the mix's seed."""
    return _digest(seed, [b"\0".join(parts)])


def is_held_out(mix: MixConfig, digest: int) -> bool:
    """Return whether a whole document of this digest belongs to the validation split."""
    return digest < mix.validation * 2**64


def assign(
    mix: MixConfig, source: TextSource, items: Iterable[tuple[T, Document | BadRecord | LeftOut]], stretches: bool
) -> Iterator[tuple[T, Assigned | BadRecord | LeftOut]]:
    """Yield a source's documents with their splits; pass other items through.

    A long document of plain text is cut in two: its last share of `mix.validation` becomes a held-out document of its
    own. Any other document is held out whole or not at all, by its digest.

    Args:
        mix: the mix with the source.
        source: the source of the items.
        items: items of `read_source`, each with its place; the first may be a later part of a training document.
        stretches: whether to cut long documents; earlier versions did not.
    """
    held_out = False
    for place, item in items:
        if not isinstance(item, Document):
            yield place, item
            continue
        total = item.part.total if item.part else item.size
        stretch = int(total * mix.validation)
        long = stretches and source.format == "text" and total >= LONG and stretch >= SHORTEST
        text_digest = None
        if item.first and (source.deduplicate or not long):
            text_digest = _digest(mix.seed, _bytes(item))
            held_out = not long and is_held_out(mix, text_digest)
        if long:
            yield from ((place, part) for part in _cut(item, text_digest, total - stretch))
        else:
            yield place, Assigned(item, held_out, text_digest, not item.first, not item.last)


def _cut(document: Document, digest: int | None, target: int) -> Iterator[Assigned]:
    """Divide a part of a long document between training, which ends near byte `target`, and the held-out stretch.

    The cut is after the last line end before `target`. If none is near, it is after a space.
    """
    before = document.part.before if document.part else 0
    after = before + document.size
    if after <= target:
        yield Assigned(document, False, digest, not document.first, after < target, after == target)
    elif before >= target:
        yield Assigned(document, True, None, before > target, not document.last)
    else:
        (text,) = document.pieces
        assert not isinstance(text, Token)
        up_to = len(text.encode()[: target - before].decode(errors="ignore"))
        near = max(0, up_to - NEAR)
        cut = text.rfind("\n", near, up_to) + 1 or text.rfind(" ", near, up_to) + 1 or max(1, up_to)
        size = len(text[:cut].encode())
        train = replace(document, pieces=(text[:cut],), size=size)
        yield Assigned(train, False, digest, not document.first, stretch=True)
        rest = replace(document, pieces=(text[cut:],), size=document.size - size)
        yield Assigned(rest, True, None, False, not document.last)


def _bytes(document: Document) -> Iterator[bytes]:
    if document.part:
        return (text.encode() for text in document.part.reread())
    return iter([b"\0".join(piece.encode() for piece in document.pieces)])


def _digest(seed: int, chunks: Iterable[bytes]) -> int:
    state = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    for chunk in chunks:
        state.update(chunk)
    return int.from_bytes(state.digest())
