"""Long calls into the tokenizers library that a signal can end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def interruptible(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Return what `work` returns or raise what it raises; run it in a thread of its own.

    Python handles signals in the main thread, and not while that is inside the library, which may take minutes. Here
    the main thread only waits. If a signal's handler raises, as Ctrl-C's does, the wait ends: `stop` is called and may
    tell the work to end; work that does not is abandoned and ends with the process.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result()
    finally:
        stop()
        wait([done], timeout=0.2)
