"""Tokenize in parallel processes. The workers import this module, so it imports nothing but the tokenizer."""

import multiprocessing
import os
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeAlias, TypeVar

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Piece, Tokenizer

GROUP_BYTES = 1 << 19
GROUP_DOCUMENTS = 1024
T = TypeVar("T")
Batch: TypeAlias = Sequence[tuple[Sequence[Piece], Sequence[bool] | None]]
"""The pieces of each document, and which of them are learned (see `rmkv_cli.data.chat.render`); None: all."""
Encoded: TypeAlias = list[tuple[array, list[tuple[int, int]] | None]]
"""For each document of a batch, its ids as array("I") and the spans of learned ids; None: all."""
Submit: TypeAlias = Callable[[Batch], "Future[Encoded]"]
"""A function that tokenizes a batch in the background."""

_tokenizer: Tokenizer
"""The tokenizer of this worker process."""


def grouped(items: Iterator[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield the items in groups of a size to tokenize at once; `size` returns an item's number of bytes of text."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= GROUP_BYTES or len(group) >= GROUP_DOCUMENTS:
            yield group
            group, total = [], 0
    if group:
        yield group


@contextmanager
def parallel_encoder(tokenizer: Tokenizer, workers: int) -> Iterator[Submit]:
    """Yield a function that tokenizes a batch of documents in one of `workers` processes; end the processes at exit.

    Raises:
        UserError: a worker died.
    """
    executor: Executor
    if workers == 1:
        executor = ThreadPoolExecutor(1)  # reading and tokenizing overlap, because the library releases Python's lock

        def submit(batch: Batch) -> "Future[Encoded]":
            return executor.submit(encode, tokenizer, batch)
    else:
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(tokenizer,))

        def submit(batch: Batch) -> "Future[Encoded]":
            with without_ctrl_c():  # the executor starts workers on demand
                return executor.submit(_work, batch)

    try:
        yield submit
    except BrokenProcessPool:
        raise UserError("a tokenizing process died, perhaps out of memory; use fewer --workers") from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Shield processes that are started in this block from Ctrl-C, which a terminal sends to every process of a job.

    Their parent ends them. A handler in the child would be installed too late, because a new process imports for
    seconds. This process handles its own Ctrl-C after the block. Otherwise another thread could deliver the signal
    between the start of a process and the data that is written to it.
    """
    resource_tracker.ensure_running()  # otherwise the first child would start it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    received: list[int] = []
    handler = None
    if threading.current_thread() is threading.main_thread():  # only this thread runs handlers
        handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if received:
            signal.raise_signal(signal.SIGINT)


def _begin(tokenizer: Tokenizer) -> None:
    global _tokenizer
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    _tokenizer = tokenizer


def end_with_parent() -> None:
    """End this process when its parent ends; run this in a thread."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed, so nothing else would stop this process


def _work(batch: Batch) -> Encoded:
    return encode(_tokenizer, batch)


def encode(tokenizer: Tokenizer, batch: Batch) -> Encoded:
    """Return the ids of each document (see `Tokenizer.encode_pieces`), and the spans of learned tokens.

    A span is (start, stop). The end of a document of n tokens is learned as its token n: the last span's stop is n + 1.
    """
    encoded = tokenizer.encode_pieces([pieces for pieces, _ in batch])
    return [
        (ids, None if learned is None else _spans(len(ids) - sum(lengths), lengths, learned))
        for (ids, lengths), (_, learned) in zip(encoded, batch, strict=True)
    ]


def _spans(start: int, lengths: Sequence[int], learned: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the spans of learned tokens; `lengths` are the pieces' numbers of tokens, from token `start` on.

    The first token of a document cannot be learned, because nothing predicts it.
    """
    spans: list[tuple[int, int]] = []
    for length, counts in zip([*lengths, 1], learned, strict=True):
        stop = start + length
        if counts and stop > max(start, 1):
            first = spans.pop()[0] if spans and spans[-1][1] == start else max(start, 1)
            spans.append((first, stop))
        start = stop
    return spans
