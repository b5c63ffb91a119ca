"""Make long calls into the tokenizers library interruptible by signals."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def interruptible(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Run `work` in a thread of its own; return its result or raise its error.

    Python handles signals in the main thread, but not during a call into the library, which may take minutes. Here the
    main thread only waits. A signal handler that raises, as for Ctrl-C, ends the wait. `stop` is then called to end
    the work. Work that continues is abandoned and ends with the process.
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
