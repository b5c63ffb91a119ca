"""Train a tokenizer on the text of a mix."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rmkv_cli.config import MixConfig, TextSource
from rmkv_cli.data.sources import Document, mix_documents
from rmkv_cli.data.splits import Assigned, assign
from rmkv_cli.errors import UserError
from rmkv_cli.progress import progress, stderr
from rmkv_cli.tokenizer import Token, Tokenizer, in_parts, train_tokenizer

MEASURED_BYTES = 1 << 20
PART = 1 << 15  # characters; the library splits hundreds of texts at once, at 130 bytes of memory per byte of text


@dataclass(frozen=True)
class Trained:
    """A trained tokenizer and its compression."""

    tokenizer: Tokenizer
    bytes: int
    """Number of bytes of its training text."""
    bytes_per_token: float
    held_out: bool
    """Whether `bytes_per_token` was measured on held-out documents; if there are none, on the last training ones."""


def train_on_mix(mix: MixConfig, base: Path, vocab_size: int, max_bytes: int | None) -> Trained:
    """Train a tokenizer on the sources of a mix, in proportion to their weights by bytes.

    Exhausted sources are dropped. Training text ends after `max_bytes` bytes or when all sources are exhausted.
    Documents that the mix holds out for validation are excluded.

    Raises:
        UserError: the sources contain no text, a record is bad, or the vocabulary is too small.
    """
    held_out, last = _Window(), _Window()
    taken = 0

    def texts(bar: ExitStack) -> Iterator[str]:
        nonlocal taken
        advance = bar.enter_context(progress("Reading text", max_bytes, "bytes"))
        for assigned in _by_bytes(mix, base):
            document = assigned.document
            if assigned.held_out:
                held_out.add(document)
                continue
            last.add(document)
            taken += document.size
            advance(document.size)
            texts = [piece for piece in document.pieces if not isinstance(piece, Token)]
            yield from (part for text in texts for part in in_parts([text], PART))
            if max_bytes is not None and taken >= max_bytes:
                break
        bar.close()
        stderr().print(f"Merging into {vocab_size:,} tokens")  # the library does not report its progress

    with ExitStack() as bar:  # also closes the bar if a signal ends this thread, but not the library's reading thread
        tokenizer = train_tokenizer(texts(bar), vocab_size)
    if not taken:
        raise UserError("the sources of the mix contain no text to train a tokenizer on")
    measured = (held_out if held_out.size else last).documents
    tokens = sum(len(ids) - 1 for ids in tokenizer.encode_documents([d.pieces for d in measured]))
    return Trained(tokenizer, taken, sum(d.size for d in measured) / tokens, bool(held_out.size))


class _Window:
    """The last documents, about MEASURED_BYTES bytes of them."""

    def __init__(self) -> None:
        self.documents: deque[Document] = deque()
        self.size = 0

    def add(self, document: Document) -> None:
        self.documents.append(document)
        self.size += document.size
        while self.size - self.documents[0].size >= MEASURED_BYTES:
            self.size -= self.documents.popleft().size


def _by_bytes(mix: MixConfig, base: Path) -> Iterator[Assigned]:
    """Yield documents, always from the source with the fewest bytes per weight so far."""
    feeds = {source.name: _assigned(mix, source, documents) for source, documents in mix_documents(mix, base)}
    # A source without weight may be the text of a task's noise, which the tokenizer must encode too.
    weights = {source.name: source.weight or 1 for source in mix.sources}
    taken = dict.fromkeys(feeds, 0)
    while feeds:
        name = min(feeds, key=lambda name: taken[name] / weights[name])
        assigned = next(feeds[name], None)
        if assigned is None:
            del feeds[name]
        else:
            taken[name] += assigned.document.size
            yield assigned


def _assigned(mix: MixConfig, source: TextSource, documents: Iterator[Document]) -> Iterator[Assigned]:
    for _, item in assign(mix, source, ((None, document) for document in documents), stretches=True):
        if isinstance(item, Assigned):
            yield item
