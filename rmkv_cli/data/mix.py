"""Mixing sources by tokens into a folder of tokenized documents."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rmkv_cli.config import FileSource, MixConfig, NoiseSource, Source, TaskSource
from rmkv_cli.data.encoding import Encoded, Submit, parallel_encoder
from rmkv_cli.data.manifest import Manifest, SourceReport
from rmkv_cli.data.noise import noise_documents
from rmkv_cli.data.records import BadRecord
from rmkv_cli.data.shards import ShardWriter
from rmkv_cli.data.sources import Document, Skipped, grouped, read_source, refuse
from rmkv_cli.data.tasks import Haystack, TextHaystack, plain_haystack, require_vocabulary, task_examples
from rmkv_cli.errors import UserError
from rmkv_cli.files import require_new, whole_directory
from rmkv_cli.progress import progress
from rmkv_cli.tokenizer import Special, Tokenizer


@dataclass(frozen=True)
class _Tokenized:
    """A tokenized document."""

    tokens: npt.NDArray[Any]
    size: int
    held_out: bool
    answers: list[tuple[int, int]] | None = None
    """Spans of the tokens that alone count in the loss; None: all do."""


_Items: TypeAlias = Iterator[_Tokenized | BadRecord]


class _Feed:
    """One source of a mix, how far it has been read, and what it gave to the training split."""

    def __init__(self, source: Source, begin: Callable[[], _Items]) -> None:
        self.source = source
        self.skipped = Skipped()
        self.epochs = 0
        self.documents = self.tokens = self.bytes = 0
        self._begin = begin
        self.start()

    def start(self) -> None:
        """Read the source from its beginning."""
        self.items = self._begin()
        self.epochs += 1
        self._tokens_before = self.tokens

    def count(self, document: _Tokenized) -> None:
        """Take note of a training document."""
        self.documents += 1
        self.tokens += len(document.tokens)
        self.bytes += document.size

    def require_progress(self) -> None:
        """Raise `UserError` if this epoch gave nothing to train on: the mix could never go on."""
        if self.tokens == self._tokens_before:
            first = f", the first: {self.skipped.first}" if self.skipped.first else ""
            raise UserError(
                f"source '{self.source.name}': has no document for training; {self.skipped.records} of its records "
                f"were skipped, the others held out for validation{first}"
            )

    def report(self, all_weights: float, all_tokens: int) -> SourceReport:
        """Return the source's part of the manifest."""
        return SourceReport(
            name=self.source.name,
            weight=self.source.weight,
            wanted=self.source.weight / all_weights,
            achieved=self.tokens / all_tokens,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
            epochs=self.epochs,
            skipped=self.skipped.records,
            first_error=self.skipped.first,
        )


def prepare(mix: MixConfig, base: Path, tokenizer: Tokenizer, out: Path, workers: int) -> Manifest:
    """Tokenize and mix the sources into the folder `out`, which appears whole, and return its manifest.

    The next document always comes from the source that has given the fewest tokens for its weight, so the ratio never
    drifts by more than a document. The mix ends when the first source runs dry or, with `mix.tokens`, when the training
    split has that many; then sources that run dry are repeated. The result does not depend on `workers`.

    Raises:
        UserError: `out` exists; a source has no files or no documents; or a record is bad and `on_error` is "stop".
        OSError: the disk is full; nothing is left on it.
    """
    require_new(out)
    _require_vocabulary(mix, tokenizer)
    try:
        with whole_directory(out) as folder:
            manifest = _write(mix, base, tokenizer, folder, workers)
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(out)) from None  # Arrow's names no file
    return manifest


def held_out(mix: MixConfig, document: Document) -> bool:
    """Return whether a document belongs to the validation split: a matter of its text and the mix's seed alone."""
    return _chosen(mix, *(piece.encode() for piece in document.pieces))


def _chosen(mix: MixConfig, *parts: bytes) -> bool:
    digest = hashlib.blake2b(b"\0".join(parts), digest_size=8, key=str(mix.seed).encode()).digest()
    return int.from_bytes(digest) < mix.validation * 2**64


def _require_vocabulary(mix: MixConfig, tokenizer: Tokenizer) -> None:
    room = tokenizer.vocab_size - len(Special) + 1
    for source in mix.sources:
        if isinstance(source, NoiseSource) and source.vocab > room:
            raise UserError(
                f"source '{source.name}': vocab = {source.vocab} does not fit the tokenizer of {tokenizer.vocab_size} "
                f"ids; at most {room}, as only the end-of-document token counts of the special ones"
            )
        if isinstance(source, TaskSource):
            require_vocabulary(source, tokenizer.vocab_size)


def _write(mix: MixConfig, base: Path, tokenizer: Tokenizer, folder: Path, workers: int) -> Manifest:
    with (
        parallel_encoder(tokenizer, workers) as submit,
        progress("Mixing", mix.tokens, "tokens") as advance,
        ShardWriter(folder, "train", tokenizer.vocab_size) as train,
        ShardWriter(folder, "validation", tokenizer.vocab_size) as validation,
    ):
        feeds = [_Feed(s, _beginner(mix, i, s, base, tokenizer, submit, workers)) for i, s in enumerate(mix.sources)]
        for index, document in _mixed(mix, feeds):
            writer = validation if document.held_out else train
            writer.add(index, document.tokens, document.size, document.answers)
            advance(len(document.tokens))
    weights, tokens = sum(s.weight for s in mix.sources), sum(f.tokens for f in feeds)
    manifest = Manifest(
        seed=mix.seed,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sources=[feed.report(weights, tokens) for feed in feeds],
        splits={"train": train.report(), "validation": validation.report()},
        ended_by=_next(feeds)[1].source.name if mix.tokens is None else None,
        mix=mix,
    )
    manifest.save(folder)
    tokenizer.save(folder)
    return manifest


def _next(feeds: list[_Feed]) -> tuple[int, _Feed]:
    """Return the source that has given the fewest tokens for its weight, and its index."""
    weighed = (pair for pair in enumerate(feeds) if pair[1].source.weight)
    return min(weighed, key=lambda pair: pair[1].tokens / pair[1].source.weight)


def _mixed(mix: MixConfig, feeds: list[_Feed]) -> Iterator[tuple[int, _Tokenized]]:
    """Yield the documents of the mix in order, each with the index of its source."""
    total = 0
    while mix.tokens is None or total < mix.tokens:
        index, feed = _next(feeds)
        item = next(feed.items, None)
        if item is None:
            feed.require_progress()
            if mix.tokens is None:
                return
            feed.start()
        elif isinstance(item, BadRecord):
            if feed.epochs == 1:
                refuse(item, feed.source.name, mix.on_error, feed.skipped)
        elif not item.held_out:
            feed.count(item)
            total += len(item.tokens)
            yield index, item
        elif feed.epochs == 1:
            yield index, item


def _beginner(
    mix: MixConfig, index: int, source: Source, base: Path, tokenizer: Tokenizer, submit: Submit, workers: int
) -> Callable[[], _Items]:
    """Return a function that reads a source from its beginning."""

    def from_files(source: FileSource) -> _Items:
        return _file_items(mix, read_source(source, base), submit, 2 * workers)

    match source:
        case FileSource():
            return lambda: from_files(source)
        case NoiseSource():
            return lambda: _noise_items(mix, index, source.vocab)
    text = next((s for s in mix.sources if isinstance(s, FileSource) and s.name == source.text), None)
    noise = TextHaystack(_TrainingText(text, mix.on_error, from_files)) if text else plain_haystack(source, tokenizer)
    return lambda: _task_items(mix, index, source, tokenizer, noise)


@dataclass(frozen=True)
class _TrainingText:
    """The tokens of a source's training documents, read anew by every iterator; bad records are reported elsewhere."""

    source: FileSource
    on_error: str
    read: Callable[[FileSource], _Items]

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        for item in self.read(self.source):
            if isinstance(item, BadRecord):
                refuse(item, self.source.name, self.on_error, Skipped())
            elif not item.held_out:
                yield item.tokens


def _task_items(mix: MixConfig, index: int, task: TaskSource, tokenizer: Tokenizer, noise: Haystack) -> _Items:
    for number, example in enumerate(task_examples(task, tokenizer, noise, [mix.seed, index])):
        tokens = np.concatenate([[tokenizer.eod], example.tokens])
        answers = [(start + 1, stop + 1) for start, stop in example.answers]
        yield _Tokenized(tokens, 0, _chosen(mix, b"%d" % index, b"%d" % number), answers)


def _noise_items(mix: MixConfig, index: int, vocab: int) -> _Items:
    for number, tokens in enumerate(noise_documents(vocab, [mix.seed, index])):
        # By number, not by tokens: were all copies of a short document held out, the others would not be uniform.
        yield _Tokenized(tokens, 0, _chosen(mix, b"%d" % index, b"%d" % number))


def _file_items(mix: MixConfig, records: Iterator[Document | BadRecord], submit: Submit, ahead: int) -> _Items:
    """Yield a source's documents in order, while up to `ahead` groups of the next ones are tokenized."""
    waiting: deque[tuple[list[Document | BadRecord], Future[Encoded]]] = deque()
    for group in chain(grouped(records), repeat(None)):
        if group is not None:
            waiting.append((group, submit([item.pieces for item in group if isinstance(item, Document)])))
        elif not waiting:
            return
        if group is None or len(waiting) > ahead:
            items, encoded = waiting.popleft()
            tokens = iter(encoded.result())
            for item in items:
                if isinstance(item, BadRecord):
                    yield item
                else:
                    yield _Tokenized(np.array(next(tokens)), item.size, held_out(mix, item))
