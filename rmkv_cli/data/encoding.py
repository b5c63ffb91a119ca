"""Tokenizing in parallel processes. The workers import this module, and so nothing but the tokenizer."""

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
"""The pieces of each document, and which of them are learned (see `rmkv_cli.data.chat.rendered`); None: all."""
Encoded: TypeAlias = list[tuple[array, list[tuple[int, int]] | None]]
"""A document's ids as array("I") and the spans of those that are learned, None for all, for each of a batch."""
Submit: TypeAlias = Callable[[Batch], "Future[Encoded]"]

_tokenizer: Tokenizer  # of this worker process


def grouped(items: Iterator[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield the items in lists that are large enough to tokenize at once; `size` returns an item's bytes of text."""
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
    """Give a function that tokenizes a batch of documents in one of `workers` processes; leaves none behind.

    Raises:
        UserError: a worker died.
    """
    executor: Executor
    if workers == 1:
        executor = ThreadPoolExecutor(1)  # reading and tokenizing still overlap: the library needs no Python lock

        def submit(batch: Batch) -> "Future[Encoded]":
            return executor.submit(encode, tokenizer, batch)
    else:
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(tokenizer,))

        def submit(batch: Batch) -> "Future[Encoded]":
            with without_ctrl_c():  # it starts workers when it needs them
                return executor.submit(_work, batch)

    try:
        yield submit
    except BrokenProcessPool:
        raise UserError("a tokenizing process died, perhaps for want of memory; fewer --workers need less") from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Let processes that are started in this block never see Ctrl-C, which a terminal sends to all of a job.

    Their parent ends them. A handler of their own would come too late: a process imports for seconds before it runs.
    This process itself gets its Ctrl-C after the block. Else it could come, by way of another thread, between the start
    of a process and what is written to it.
    """
    resource_tracker.ensure_running()  # else the first process started would start it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came: list[int] = []
    handler = None
    if threading.current_thread() is threading.main_thread():  # the one that runs handlers
        handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _begin(tokenizer: Tokenizer) -> None:
    global _tokenizer
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    _tokenizer = tokenizer


def end_with_parent() -> None:
    """End this process as soon as its parent is no more; to be run in a thread."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed: nobody would ever tell this process to stop


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
    """Return the spans of learned tokens, given the lengths of the pieces, the first of which begins at token `start`.

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
