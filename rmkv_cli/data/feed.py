"""Read the sources of a mix as tokenized documents, from any place on."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.config import MixConfig, NoiseSource, Source, TaskSource, TextSource
from rmkv_cli.data.blocks import BadRecord
from rmkv_cli.data.encoding import Encoded, Submit, grouped
from rmkv_cli.data.noise import noise_document
from rmkv_cli.data.order import Place
from rmkv_cli.data.sources import LeftOut, Skipped, open_source, read_source, skip_or_raise
from rmkv_cli.data.splits import Assigned, assign, digest, is_held_out
from rmkv_cli.data.tasks import Haystack, TextHaystack, plain_haystack, task_example
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tokenized:
    """A tokenized document, or one part of a long document."""

    tokens: NDArray[Any]
    size: int
    """Number of bytes of its untrusted text."""
    held_out: bool
    """Whether this text belongs to the validation split."""
    digest: int | None = None
    """Digest, as in `Assigned`; duplicates have equal digests."""
    answers: list[tuple[int, int]] | None = None
    """Spans of the tokens that count in the loss, as in `rmkv_cli.data.shards.schema`; None: all tokens count."""
    continues: bool = False
    """Whether this part continues the document of the previous item."""
    more: bool = False
    """Whether another part of the document follows."""
    stretch: bool = False
    """Whether the document's held-out stretch follows."""

    @property
    def counted(self) -> int:
        """Number of its tokens that count in the loss, the document's end included."""
        return len(self.tokens) if self.answers is None else sum(stop - start for start, stop in self.answers)


Item: TypeAlias = Tokenized | BadRecord | LeftOut
Items: TypeAlias = Iterator[tuple[Any, Item]]
"""Items, each with the place after it as plain values."""
Splits: TypeAlias = Literal["train", "validation", "both"]
"""The splits whose documents are read."""
Open: TypeAlias = Callable[[Any], Items]
"""A function that reads a source from a place on; None is its beginning."""


def feeds(
    mix: MixConfig,
    base: Path,
    tokenizer: Tokenizer,
    submit: Submit,
    ahead: int,
    splits: Splits,
    *,
    stretches: bool,
) -> list[Open]:
    """Return a function for each source that reads one epoch of a text source, or an endless source without end.

    Args:
        mix: the mix with the sources.
        base: the folder that their files are relative to.
        tokenizer: the tokenizer that `submit` uses.
        submit: tokenizes a batch.
        ahead: number of groups of documents per source that are tokenized in advance.
        splits: the splits to read; documents of other splits are dropped before they are tokenized.
        stretches: as in `assign`.
    """
    begin = int(tokenizer.roles.begin is not None)
    files = {source.name: open_source(source, base) for source in mix.sources if isinstance(source, TextSource)}

    def open_text(index: int, source: TextSource, splits: Splits) -> Open:
        def items(place: Any) -> Items:
            start = Place() if place is None else Place.from_json(place)
            read = read_source(source, files[source.name], [mix.seed, index], start, mix.supervision(source), tokenizer)
            return _tokenized(assign(mix, source, read, stretches), submit, ahead, splits)

        return items

    def open_one(index: int, source: Source) -> Open:
        match source:
            case TextSource():
                return open_text(index, source, splits)
            case NoiseSource():
                return lambda place: _noise(mix, index, source, tokenizer, place or 0, splits)
        text_index = next((i for i, s in enumerate(mix.sources) if s.name == source.text), None)

        def noise(place: Any) -> Haystack:
            if text_index is None:
                return plain_haystack(source, tokenizer)
            text = mix.sources[text_index]
            assert isinstance(text, TextSource)
            read = _EndlessTraining(text.name, open_text(text_index, text, "train"), mix.on_error, begin)
            return TextHaystack(read, place)

        def examples(place: Any) -> Items:
            number, noise_place = place or (0, None)
            return _examples(mix, index, source, tokenizer, noise(noise_place), number, splits)

        return examples

    return [open_one(index, source) for index, source in enumerate(mix.sources)]


@dataclass(frozen=True)
class _EndlessTraining:
    """Reads a source's training documents endlessly, each with the place before it, as a task's noise."""

    name: str
    items: Open
    on_error: str
    begin: int
    """Number of tokens at a document's beginning that are not text."""

    def __call__(self, place: Any) -> Iterator[tuple[Any, NDArray[Any]]]:
        place = place or Place().to_json()
        while True:
            # An epoch that is resumed half-way may have no documents left.
            empty, before = place == Place(place[0]).to_json(), place
            for after, item in self.items(place):
                if isinstance(item, BadRecord):
                    skip_or_raise(item, self.name, self.on_error, Skipped())
                elif isinstance(item, Tokenized) and len(
                    text := item.tokens if item.continues else item.tokens[self.begin :]
                ):
                    empty = False
                    yield before, text
                before = after
            if empty:
                raise UserError(f"source '{self.name}': has no training text for a task's noise")
            place = Place(place[0] + 1).to_json()


def _tokenized(
    read: Iterator[tuple[Place, Assigned | BadRecord | LeftOut]], submit: Submit, ahead: int, splits: Splits
) -> Items:
    """Yield documents in order, while up to `ahead` groups of later documents are being tokenized."""

    def selected() -> Iterator[tuple[Place, Assigned | BadRecord | LeftOut]]:
        document_digest = None
        for place, item in read:
            if isinstance(item, Assigned):
                document_digest = document_digest if item.digest is None else item.digest
                if not _is_selected(splits, item.held_out):
                    continue
                if splits == "validation" and not item.continues:
                    # Only the stretch of this document is read, so it carries the document's digest.
                    item = replace(item, digest=document_digest)
            yield place, item

    def size(pair: tuple[Place, Assigned | BadRecord | LeftOut]) -> int:
        return pair[1].document.size if isinstance(pair[1], Assigned) else 0

    waiting: deque[tuple[list[Any], Future[Encoded]]] = deque()
    for group in chain(grouped(selected(), size), repeat(None)):
        if group is not None:
            assigned = [item for _, item in group if isinstance(item, Assigned)]
            waiting.append((group, submit([(item.placed, item.document.learned) for item in assigned])))
        elif not waiting:
            return
        if group is None or len(waiting) > ahead:
            pairs, encoded = waiting.popleft()
            results = iter(encoded.result())
            for place, item in pairs:
                if isinstance(item, Assigned):
                    tokens, answers = next(results)
                    fields = item.held_out, item.digest, answers, item.continues, item.more, item.stretch
                    yield place.to_json(), Tokenized(np.array(tokens), item.document.size, *fields)
                else:
                    yield place.to_json(), item


def _is_selected(splits: Splits, held_out: bool) -> bool:
    return splits == "both" or held_out == (splits == "validation")


def _noise(mix: MixConfig, index: int, source: NoiseSource, tokenizer: Tokenizer, first: int, splits: Splits) -> Items:
    first_id = tokenizer.text_ids.start
    for number in count(first):
        # Chosen by number, not by content: if all copies of a short document were held out, the training documents
        # would not be uniformly random.
        held_out = is_held_out(mix, digest(mix.seed, b"%d" % index, b"%d" % number))
        if _is_selected(splits, held_out):
            yield (
                number + 1,
                Tokenized(
                    noise_document(source.vocab, [mix.seed, index, number], first_id, tokenizer.opening), 0, held_out
                ),
            )


def _examples(
    mix: MixConfig, index: int, task: TaskSource, tokenizer: Tokenizer, noise: Haystack, first: int, splits: Splits
) -> Items:
    for number in count(first):
        example = task_example(task, tokenizer, noise, [mix.seed, index, number])
        held_out = is_held_out(mix, digest(mix.seed, b"%d" % index, b"%d" % number))
        if _is_selected(splits, held_out):
            answers = [(start + 1, stop + 1) for start, stop in example.answers]
            tokens = np.concatenate([[tokenizer.opening], example.tokens])
            yield (number + 1, noise.place), Tokenized(tokens, 0, held_out, None, answers)
