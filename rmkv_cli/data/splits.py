"""Which text trains and which is held out: whole short documents, and the last part of each long one."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from rmkv_cli.config import MixConfig, TextSource
from rmkv_cli.data.blocks import BadRecord
from rmkv_cli.data.sources import Document, LeftOut
from rmkv_cli.tokenizer import Special

LONG = 1 << 16  # bytes of a document that gives a stretch
SHORTEST = 512  # bytes of a stretch
NEAR = 4096  # characters before the cut among which a line's end is looked for
T = TypeVar("T")


@dataclass(frozen=True)
class Assigned:
    """A document, or a part of one that is long, and the split that it is in."""

    document: Document
    held_out: bool
    digest: int | None = None
    """A number from 0 to 2^64 - 1, of the text and the mix's seed; None of what belongs to the document before it: its
    next part, or its held-out stretch; and where nothing depends on it."""
    continues: bool = False
    """Whether it is the next part of the one before."""
    more: bool = False
    """Whether a next part follows."""
    stretch: bool = False
    """Whether it is the last part that trains of a document whose held-out stretch follows."""


def digest(seed: int, *parts: bytes) -> int:
    """Return a number from 0 to 2^64 - 1 that a document's parts and the mix's seed give."""
    return _digest(seed, [b"\0".join(parts)])


def is_held_out(mix: MixConfig, digest: int) -> bool:
    """Return whether a whole document of this digest belongs to the validation split."""
    return digest < mix.validation * 2**64


def assign(
    mix: MixConfig, source: TextSource, items: Iterable[tuple[T, Document | BadRecord | LeftOut]], stretches: bool
) -> Iterator[tuple[T, Assigned | BadRecord | LeftOut]]:
    """Yield the documents of a source with their splits, and what stands among them.

    A document of plain text that is long is cut in two: its last `mix.validation` is held out, a document of its own.
    Any other is held out or not as a whole, by its digest.

    Args:
        mix: of the source.
        source: where the items are from.
        items: of `read_source`, each with its place; may begin with a later part of a document that trains.
        stretches: whether long documents are cut; earlier versions did not.
    """
    held_out = False
    for place, item in items:
        if not isinstance(item, Document):
            yield place, item
            continue
        total = item.part.total if item.part else item.size
        stretch = int(total * mix.validation)
        long = stretches and source.format == "text" and total >= LONG and stretch >= SHORTEST
        its = None
        if item.first and (source.deduplicate or not long):
            its = _digest(mix.seed, _bytes(item))
            held_out = not long and is_held_out(mix, its)
        if long:
            yield from ((place, part) for part in _cut(item, its, total - stretch))
        else:
            yield place, Assigned(item, held_out, its, not item.first, not item.last)


def _cut(document: Document, digest: int | None, target: int) -> Iterator[Assigned]:
    """Yield what a part of a long document gives to the training, which ends near byte `target`, and to the stretch.

    The cut is after the last line's end before `target`, or for want of one that is near, after a blank.
    """
    before = document.part.before if document.part else 0
    after = before + document.size
    if after <= target:
        yield Assigned(document, False, digest, not document.first, after < target, after == target)
    elif before >= target:
        yield Assigned(document, True, None, before > target, not document.last)
    else:
        (text,) = document.pieces
        assert not isinstance(text, Special)
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
