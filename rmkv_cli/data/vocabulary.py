"""Training a tokenizer on the text of a mix."""

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
    """A tokenizer and how well it does."""

    tokenizer: Tokenizer
    bytes: int
    """Of the text that it was trained on."""
    bytes_per_token: float
    held_out: bool
    """Whether `bytes_per_token` is of held-out documents; else, for want of any, of the last training ones."""


def train_on_mix(mix: MixConfig, base: Path, vocab_size: int, max_bytes: int | None) -> Trained:
    """Train a tokenizer on the sources of a mix, in proportion to their weights by bytes.

    Sources that run dry drop out; it ends after `max_bytes` or when all are dry. Documents that the mix holds out for
    validation are not trained on.

    Raises:
        UserError: the sources hold no text, a record is bad, or the vocabulary is too small.
    """
    held, last = _Window(), _Window()
    taken = 0

    def texts(bar: ExitStack) -> Iterator[str]:
        nonlocal taken
        advance = bar.enter_context(progress("Reading text", max_bytes, "bytes"))
        for assigned in _by_bytes(mix, base):
            document = assigned.document
            if assigned.held_out:
                held.add(document)
                continue
            last.add(document)
            taken += document.size
            advance(document.size)
            texts = [piece for piece in document.pieces if not isinstance(piece, Token)]
            yield from (part for text in texts for part in in_parts([text], PART))
            if max_bytes is not None and taken >= max_bytes:
                break
        bar.close()
        stderr().print(f"Merging into {vocab_size:,} tokens")  # the library's progress cannot be asked for

    with ExitStack() as bar:  # closed here as well: a signal ends this thread, but not the library's thread that reads
        tokenizer = train_tokenizer(texts(bar), vocab_size)
    if not taken:
        raise UserError("the sources of the mix hold no text to train a tokenizer on")
    measured = (held if held.size else last).documents
    tokens = sum(len(ids) - 1 for ids in tokenizer.encode_documents([d.pieces for d in measured]))
    return Trained(tokenizer, taken, sum(d.size for d in measured) / tokens, bool(held.size))


class _Window:
    """The last MEASURED_BYTES or so of documents."""

    def __init__(self) -> None:
        self.documents: deque[Document] = deque()
        self.size = 0

    def add(self, document: Document) -> None:
        self.documents.append(document)
        self.size += document.size
        while self.size - self.documents[0].size >= MEASURED_BYTES:
            self.size -= self.documents.popleft().size


def _by_bytes(mix: MixConfig, base: Path) -> Iterator[Assigned]:
    """Yield documents, always from the source that has given the fewest bytes for its weight."""
    feeds = {source.name: _assigned(mix, source, documents) for source, documents in mix_documents(mix, base)}
    weights = {source.name: source.weight or 1 for source in mix.sources}  # a task's noise is text to be spelt as well
    served = dict.fromkeys(feeds, 0)
    while feeds:
        name = min(feeds, key=lambda name: served[name] / weights[name])
        assigned = next(feeds[name], None)
        if assigned is None:
            del feeds[name]
        else:
            served[name] += assigned.document.size
            yield assigned


def _assigned(mix: MixConfig, source: TextSource, documents: Iterator[Document]) -> Iterator[Assigned]:
    for _, item in assign(mix, source, ((None, document) for document in documents), stretches=True):
        if isinstance(item, Assigned):
            yield item
