"""One source of a mix as tokenized documents, from any place on."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.config import MixConfig, NoiseSource, Source, TaskSource, TextSource
from rmkv_cli.data.encoding import Encoded, Submit
from rmkv_cli.data.noise import noise_document
from rmkv_cli.data.order import Place
from rmkv_cli.data.records import BadRecord
from rmkv_cli.data.sources import Document, LeftOut, Skipped, digest, grouped, open_source, read_source, refuse
from rmkv_cli.data.tasks import Haystack, TextHaystack, plain_haystack, task_example
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokenized:
    """A tokenized document."""

    tokens: NDArray[Any]
    size: int
    """Bytes of its untrusted text."""
    digest: int
    """A number from 0 to 2^64 - 1, of its text and the mix's seed, or of its number where it is generated."""
    answers: list[tuple[int, int]] | None = None
    """Spans of the tokens that alone count in the loss; None: all do."""


Item: TypeAlias = Tokenized | BadRecord | LeftOut
Items: TypeAlias = Iterator[tuple[Any, Item]]
"""Each with the place after it, as plain values."""
Wanted: TypeAlias = Callable[[int], bool]
"""Whether the document of a digest is."""
Open: TypeAlias = Callable[[Any], Items]
"""Reads a source from a place on; None is its beginning."""


def feeds(
    mix: MixConfig,
    base: Path,
    tokenizer: Tokenizer,
    submit: Submit,
    ahead: int,
    wanted: Wanted,
    training: Wanted,
) -> list[Open]:
    """Return for each source a function that reads it: one epoch of a source of text, or all of an endless one.

    Args:
        mix: of the sources.
        base: the folder that their files are relative to.
        tokenizer: theirs.
        submit: what tokenizes.
        ahead: groups of documents that are tokenized before they are asked for, a source.
        wanted: whether a document of this digest is; others are left out before they are tokenized.
        training: whether a document of this digest may be the noise of a task.
    """
    files = {source.name: open_source(source, base) for source in mix.sources if isinstance(source, TextSource)}

    def open_text(index: int, source: TextSource, chosen: Wanted) -> Open:
        def items(place: Any) -> Items:
            start = Place() if place is None else Place.from_json(place)
            read = read_source(source, files[source.name], [mix.seed, index], start)
            return _tokenized(read, mix.seed, submit, ahead, chosen)

        return items

    def open_one(index: int, source: Source) -> Open:
        match source:
            case TextSource():
                return open_text(index, source, wanted)
            case NoiseSource():
                return lambda place: _noise(mix, index, source, place or 0, wanted)
        text = next((i for i, s in enumerate(mix.sources) if s.name == source.text), None)

        def noise(place: Any) -> Haystack:
            if text is None:
                return plain_haystack(source, tokenizer)
            its = mix.sources[text]
            assert isinstance(its, TextSource)
            return TextHaystack(_Training(its.name, open_text(text, its, training), mix.on_error), place)

        def examples(place: Any) -> Items:
            number, hay = place or (0, None)
            return _examples(mix, index, source, tokenizer, noise(hay), number, wanted)

        return examples

    return [open_one(index, source) for index, source in enumerate(mix.sources)]


@dataclass(frozen=True)
class _Training:
    """A source's documents again and again, each with the place before it, as a task's noise."""

    name: str
    items: Open
    on_error: str

    def __call__(self, place: Any) -> Iterator[tuple[Any, NDArray[Any]]]:
        place = place or Place().to_json()
        while True:
            empty, before = place == Place(place[0]).to_json(), place  # begun half-way it may well have no more
            for after, item in self.items(place):
                if isinstance(item, BadRecord):
                    refuse(item, self.name, self.on_error, Skipped())
                elif isinstance(item, Tokenized) and len(item.tokens) > 1:
                    empty = False
                    yield before, item.tokens[1:]
                before = after
            if empty:
                raise UserError("there is no text that a task's noise could be taken from")
            place = Place(place[0] + 1).to_json()


def _tokenized(
    read: Iterator[tuple[Place, Document | BadRecord | LeftOut]],
    seed: int,
    submit: Submit,
    ahead: int,
    wanted: Wanted,
) -> Items:
    """Yield documents in order, while up to `ahead` groups of the next ones are tokenized."""

    def chosen() -> Iterator[tuple[tuple[Place, int], Document | BadRecord | LeftOut]]:
        for place, item in read:
            if not isinstance(item, Document):
                yield (place, 0), item
                continue
            its = digest(seed, *(piece.encode() for piece in item.pieces))
            if wanted(its):
                yield (place, its), item

    waiting: deque[tuple[list[Any], Future[Encoded]]] = deque()
    for group in chain(grouped(chosen()), repeat(None)):
        if group is not None:
            waiting.append((group, submit([item.pieces for _, item in group if isinstance(item, Document)])))
        elif not waiting:
            return
        if group is None or len(waiting) > ahead:
            pairs, encoded = waiting.popleft()
            tokens = iter(encoded.result())
            for (place, its), item in pairs:
                if isinstance(item, Document):
                    yield place.to_json(), Tokenized(np.array(next(tokens)), item.size, its)
                else:
                    yield place.to_json(), item


def _noise(mix: MixConfig, index: int, source: NoiseSource, first: int, wanted: Wanted) -> Items:
    for number in count(first):
        # By number, not by tokens: were all copies of a short document held out, the others would not be uniform.
        its = digest(mix.seed, b"%d" % index, b"%d" % number)
        if wanted(its):
            yield number + 1, Tokenized(noise_document(source.vocab, [mix.seed, index, number]), 0, its)


def _examples(
    mix: MixConfig, index: int, task: TaskSource, tokenizer: Tokenizer, noise: Haystack, first: int, wanted: Wanted
) -> Items:
    for number in count(first):
        example = task_example(task, tokenizer, noise, [mix.seed, index, number])
        its = digest(mix.seed, b"%d" % index, b"%d" % number)
        if wanted(its):
            answers = [(start + 1, stop + 1) for start, stop in example.answers]
            tokens = np.concatenate([[tokenizer.eod], example.tokens])
            yield (number + 1, noise.place), Tokenized(tokens, 0, its, answers)
