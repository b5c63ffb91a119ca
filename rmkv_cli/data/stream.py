"""Stream the documents of a mix, read and tokenized in a separate process during training."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from rmkv_cli.config import MixConfig, TextSource
from rmkv_cli.data.encoding import end_with_parent, parallel_encoder, without_ctrl_c
from rmkv_cli.data.feed import Tokenized
from rmkv_cli.data.lanes import EndOfData, InMemory
from rmkv_cli.data.mixer import Mixer
from rmkv_cli.data.shards import counted
from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer

CHUNK_TOKENS = 1 << 16
CHUNKS_AHEAD = 8
END_TIMEOUT = 5.0
"""Seconds that the process has to end by itself before it is killed."""
NOTICE_INTERVAL = 20
"""Seconds without data between notices."""


@dataclass(frozen=True)
class Sent:
    """A document or a part of one, with its source's index and epoch."""

    source: int
    epoch: int
    document: Tokenized


@dataclass(frozen=True)
class _Chunk:
    state: dict[str, Any]
    """State of the mixer before these documents."""
    documents: list[Sent]


class Stream:
    """A mix's training documents as a `Queue` (see `rmkv_cli.data.lanes`) and context manager; endless if the mix is.

    Args:
        mix: the mix.
        base: the folder that its files are relative to.
        tokenizer: the model's tokenizer.
        workers: number of tokenizing processes, in addition to the one that reads.
        stretches: as in `assign`.
    """

    def __init__(
        self, mix: MixConfig, base: Path, tokenizer: Tokenizer, workers: int = 1, *, stretches: bool = True
    ) -> None:
        self._job = (mix, base, tokenizer, workers, stretches)
        self._type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self._seen = {
            i: (1, array("Q")) for i, s in enumerate(mix.sources) if isinstance(s, TextSource) and s.deduplicate
        }
        self._chunk = _Chunk({}, [])
        self._taken = 0
        self._process: Any = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. A thread that is reading from it gets an error."""
        if self._process is not None:
            self._process.terminate()
            self._process.join(END_TIMEOUT)
            self._process.kill()
            self._process.join()

    def _start(self, state: dict[str, Any] | None) -> None:
        self.close()
        context = multiprocessing.get_context("spawn")
        self._received, sent = context.Pipe(duplex=False)
        seen = {index: known for index, (_, known) in self._seen.items()}
        self._process = context.Process(target=_serve, args=(sent, *self._job, state, seen))
        with without_ctrl_c():
            self._process.start()
        sent.close()  # then only the process holds this end, and the pipe closes with it

    def next(self) -> InMemory:
        """Return the next whole document (see `Queue`), in the narrowest type that holds its tokens.

        Raises:
            UserError: the mix cannot continue.
            EndOfData: the mix ended as configured.
        """
        document = self._take()
        counts = counted(len(document.tokens), document.answers)
        parts = [document.tokens.astype(self._type)]
        while document.more:
            document = self._take()
            parts.append(document.tokens.astype(self._type))
        return InMemory(np.concatenate(parts), counts)

    def reopen(self, rest: dict[str, Any]) -> tuple[InMemory, int]:
        """Return a document and the offset of its next token (see `Queue`)."""
        return InMemory.reopened(rest), 0

    def _take(self) -> Tokenized:
        """Return the next document or part of a document."""
        if self._process is None:
            self._start(None)
        while self._taken == len(self._chunk.documents):
            chunk = self._receive()  # raises at the end of the mix, and then the seen documents stay as they were
            self._note_seen()
            self._chunk, self._taken = chunk, 0
        self._taken += 1
        return self._chunk.documents[self._taken - 1].document

    def _receive(self) -> _Chunk:
        waited = 0
        while not self._received.poll(NOTICE_INTERVAL):
            waited += NOTICE_INTERVAL
            stderr().print(f"no data received for {waited} s; still waiting", style="yellow")
        try:
            received = self._received.recv()
        except (EOFError, OSError):
            raise UserError("the process that reads the data died, perhaps out of memory") from None
        if isinstance(received, Exception):
            raise received
        return received

    def _note_seen(self) -> None:
        """Add the chunk's documents to the digests by which duplicates are found."""
        for sent in self._chunk.documents:
            if sent.source in self._seen and sent.document.digest is not None:
                epoch, known = self._seen[sent.source]
                if epoch != sent.epoch:
                    known = array("Q")
                known.append(sent.document.digest)
                self._seen[sent.source] = sent.epoch, known

    def bookmark(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns this place as plain values (see `Queue`)."""
        chunk, taken = self._chunk, self._taken
        seen = [(index, epoch, known, len(known)) for index, (epoch, known) in self._seen.items()]  # they only grow
        return lambda: {
            "mixer": chunk.state,
            "taken": taken,
            "seen": {index: [epoch, known[:count].tolist()] for index, epoch, known, count in seen},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._seen = {index: (epoch, array("Q", known)) for index, (epoch, known) in state["seen"].items()}
        self._start(state["mixer"] or None)
        self._chunk, self._taken = (self._receive(), state["taken"]) if state["mixer"] else (_Chunk({}, []), 0)


def _serve(
    sent: Connection,
    mix: MixConfig,
    base: Path,
    tokenizer: Tokenizer,
    workers: int,
    stretches: bool,
    state: dict[str, Any] | None,
    seen: dict[int, array],
) -> None:
    """Send chunks and, if the mix ends, the reason as an exception."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ignore further ones
        sys.exit()

    os.setsid()  # a session of its own, because torchrun's SIGTERM reaches a whole session; the parent ends the work
    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=end_with_parent, daemon=True).start()
    ahead: queue.Queue[_Chunk | Exception] = queue.Queue(CHUNKS_AHEAD)
    threading.Thread(target=_send, args=(sent, ahead), daemon=True).start()
    try:
        with parallel_encoder(tokenizer, workers) as submit:
            mixer = Mixer(mix, base, tokenizer, submit, 2 * workers, "train", endless=True, stretches=stretches)
            if state is not None:
                mixer.load_state_dict(state)
            for index, known in seen.items():
                mixer.readers[index].seen.update(known)
            for chunk in _chunks(mixer):
                ahead.put(chunk)
            what = f"source '{mixer.ended_by}' is exhausted" if mixer.ended_by else "all sources are exhausted"
            ahead.put(EndOfData(f"end of the data: {what}, and when_dry does not repeat"))
    except (UserError, OSError) as error:
        ahead.put(UserError(str(error)))
    except Exception as error:
        traceback.print_exc()
        ahead.put(UserError(f"the process that reads the data failed: {type(error).__name__}: {error}"))
    ahead.join()


def _send(sent: Connection, ahead: "queue.Queue[_Chunk | Exception]") -> None:
    while True:
        sent.send(ahead.get())
        ahead.task_done()


def _chunks(mixer: Mixer) -> Iterator[_Chunk]:
    state, documents, tokens = mixer.state_dict(), [], 0
    for index, document in mixer:
        documents.append(Sent(index, mixer.readers[index].epochs, document))
        tokens += len(document.tokens)
        if tokens >= CHUNK_TOKENS:
            yield _Chunk(state, documents)
            state, documents, tokens = mixer.state_dict(), [], 0
    if documents:
        yield _Chunk(state, documents)
