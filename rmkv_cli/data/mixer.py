"""Yield the documents of a mix in their fixed order, from any place on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmkv_cli.config import MixConfig, Source, TextSource
from rmkv_cli.data.balance import Balance
from rmkv_cli.data.blocks import BadRecord
from rmkv_cli.data.encoding import Submit
from rmkv_cli.data.feed import Items, Open, Splits, Tokenized, feeds
from rmkv_cli.data.order import Place
from rmkv_cli.data.sources import Skipped, skip_or_raise
from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer

NOTHING_SUPERVISED = (
    "no token of the mix is supervised, so there is nothing to learn: supervise = 'answers' learns only turns of the "
    "assistant without train = false; check the roles with `rmkv data inspect`, or set supervise = 'all'"
)


def nothing_supervised(source: str) -> str:
    """Return the warning about a source without supervised tokens."""
    return f"warning: source '{source}': no token of its documents is supervised, so nothing is learned from it"


class Reader:
    """The reader of one source of a mix, with counts of the documents in the balanced split."""

    def __init__(self, source: Source, begin: Open) -> None:
        self.source = source
        self.skipped = Skipped()
        self.epochs = 1
        self.documents = self.tokens = self.bytes = self.duplicates = self.left_out = 0
        self.supervised = 0
        """Number of tokens that count in the loss."""
        self.held_out_documents = self.held_out_tokens = 0
        self.seen: set[int] = set()
        """Digests of this epoch's documents, if duplicates are left out."""
        self._is_duplicate = False
        self._begin = begin
        self._place: Any = None
        self._tokens_before = 0
        self.items: Items = begin(None)

    def next(self) -> tuple[Any, Any] | None:
        """Return the place after the next item and the item, or None at the source's end."""
        pair = next(self.items, None)
        if pair is not None:
            self._place = pair[0]
        return pair

    def start_epoch(self) -> None:
        """Read the source again from its beginning, in another order."""
        self._place = Place(self.epochs).to_json()
        self.epochs += 1
        self.seen.clear()
        self._tokens_before = self.tokens
        self.items = self._begin(self._place)

    def is_duplicate(self, document: Tokenized) -> bool:
        """Return whether the document occurred before in this epoch, and remember it."""
        if document.digest is not None and isinstance(self.source, TextSource) and self.source.deduplicate:
            self._is_duplicate = document.digest in self.seen
            self.seen.add(document.digest)
            self.duplicates += self._is_duplicate and self.epochs == 1
        return self._is_duplicate  # a later part shares the verdict of its document's first part

    def count(self, document: Tokenized, balanced: bool) -> None:
        """Count a document or a part of one; `balanced` says whether it is in the split that follows the weights."""
        if balanced:
            self.documents += not document.continues
            self.tokens += len(document.tokens)
            self.bytes += document.size
            self.supervised += document.counted
        if document.held_out and self.epochs == 1:
            self.held_out_documents += not document.continues
            self.held_out_tokens += len(document.tokens)

    def require_progress(self) -> None:
        """Raise `UserError` if this epoch gave no token, because repeating it would never end."""
        if self.tokens == self._tokens_before:
            first = f", the first: {self.skipped.first}" if self.skipped.first else ""
            raise UserError(
                f"source '{self.source.name}': has no document for training; {self.skipped.records} of its records "
                f"were skipped, {self.left_out + self.duplicates} left out, the others held out for validation{first}"
            )

    _COUNTS = (
        *("epochs", "documents", "tokens", "bytes", "supervised", "duplicates", "left_out"),
        *("_place", "_tokens_before"),
    )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict` as plain values, without `seen`."""
        return {name: getattr(self, name) for name in self._COUNTS} | {
            "skipped": self.skipped.records,
            "first_error": self.skipped.first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        state = {"supervised": state["tokens"]} | state  # states of earlier versions lack this count
        for name in self._COUNTS:
            setattr(self, name, state[name])
        self.skipped = Skipped(state["skipped"], state["first_error"])
        self.items = self._begin(self._place)


class Mixer:
    """Yields (index of the source, document), endlessly or until the mix has its tokens or a source ends it.

    The same mix gives the same documents in the same order, after any resume and for any number of processes.
    """

    def __init__(
        self,
        mix: MixConfig,
        base: Path,
        tokenizer: Tokenizer,
        submit: Submit,
        ahead: int,
        splits: Splits = "both",
        *,
        endless: bool = False,
        stretches: bool = True,
    ) -> None:
        """Open all sources.

        Args:
            mix: the mix.
            base: the folder that its files are relative to.
            tokenizer: the tokenizer for tasks and noise, which `submit` uses as well.
            submit: tokenizes a batch.
            ahead: number of groups of documents per source that are tokenized in advance.
            splits: the splits to yield. The weights balance training documents or, if alone, validation documents.
            stretches: whether long documents give a held-out stretch (see `assign`).
            endless: continue beyond `mix.tokens`, and repeat sources by default.

        Raises:
            UserError: a source cannot be opened.
        """
        self.mix, self._splits, self._endless = mix, splits, endless
        opened = feeds(mix, base, tokenizer, submit, ahead, splits, stretches=stretches)
        self.readers = [Reader(source, begin) for source, begin in zip(mix.sources, opened, strict=True)]
        self.balance = Balance(mix)
        self._tokens = None if endless else mix.tokens
        self._open: tuple[int, int] | None = (
            None  # index of the source with an unfinished document, and its tokens so far
        )
        self.ended_by: str | None = None
        """Name of the exhausted source that ended the mix."""

    def __iter__(self) -> Iterator[tuple[int, Tokenized]]:
        while not self._is_full():
            index = self._open[0] if self._open else self.balance.next()
            if index is None:
                return
            reader = self.readers[index]
            pair = reader.next()
            if pair is None:
                if not self._continues_after_end(index, reader):
                    return
                continue
            item = pair[1]
            if isinstance(item, BadRecord):
                if reader.epochs == 1:
                    skip_or_raise(item, reader.source.name, self.mix.on_error, reader.skipped)
            elif not isinstance(item, Tokenized):
                reader.left_out += reader.epochs == 1
            elif reader.is_duplicate(item):
                continue
            else:
                balanced = self._splits != "both" or not item.held_out
                more = item.more or (item.stretch and self._splits == "both")
                length = (self._open[1] if self._open else 0) + (len(item.tokens) if balanced else 0)
                self._open = (index, length) if more else None
                if length and not more:  # counted as a whole, so that the order does not depend on the parts
                    self.balance.count(index, length)
                reader.count(item, balanced)
                if balanced or reader.epochs == 1:
                    yield index, item

    def _is_full(self) -> bool:
        """Return whether the mix has reached its number of tokens; a training document is never cut."""
        if self._tokens is None or (self._open and self._splits != "validation"):
            return False
        return sum(self.balance.tokens) + (self._open[1] if self._open else 0) >= self._tokens

    def _continues_after_end(self, index: int, reader: Reader) -> bool:
        """Repeat, drop or stop at an exhausted source, as configured; return whether the mix continues."""
        source = reader.source
        assert isinstance(source, TextSource)
        if self._splits == "validation":  # each held-out document occurs once
            self.balance.drop(index)
            return True
        reader.require_progress()
        then = source.when_dry or ("repeat" if self._endless or self.mix.tokens else "stop")
        if self._endless:
            self._require_supervision(index, last=then == "stop")
        match then:
            case "repeat":
                reader.start_epoch()
                if reader.epochs & (reader.epochs - 1) == 0:  # only at 2, 4, 8, ...: small sources restart often
                    stderr().print(f"source '{source.name}': epoch {reader.epochs} begins", style="dim")
            case "drop":
                self.balance.drop(index)
                stderr().print(f"source '{source.name}': exhausted, so it is dropped", style="dim")
            case "stop":
                self.ended_by = source.name
                return False
        return True

    def _require_supervision(self, ended: int, *, last: bool) -> None:
        """Warn if an exhausted source has no supervised token; raise `UserError` if no source can have any.

        Args:
            ended: index of the exhausted source.
            last: whether the mix ends with this source.
        """
        if self.readers[ended].supervised:
            return
        if self.readers[ended].epochs == 1:
            stderr().print(nothing_supervised(self.readers[ended].source.name), style="yellow")
        unread = [
            i != ended and reader.epochs == 1 and self.balance.is_used(i) for i, reader in enumerate(self.readers)
        ]
        if (last or not any(unread)) and not any(reader.supervised for reader in self.readers):
            raise UserError(NOTHING_SUPERVISED)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict` as plain values, without the readers' `seen`."""
        readers = [reader.state_dict() for reader in self.readers]
        return {"balance": self.balance.state_dict(), "readers": readers, "open": self._open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.balance.load_state_dict(state["balance"])
        self._open = state.get("open")  # states of earlier versions lack this key
        for reader, reader_state in zip(self.readers, state["readers"], strict=True):
            reader.load_state_dict(reader_state)
