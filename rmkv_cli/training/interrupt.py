"""Graceful handling of Ctrl-C and SIGTERM: finish the step and save before exiting."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """The signal that asked training to stop, if any."""

    signal: int | None = None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Record the first SIGINT or SIGTERM instead of exiting; a second one kills the process as usual.

    If training fails after a recorded signal, as a rank's does when another rank has died, the signal kills the process
    after all.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def record(number: int, _: FrameType | None) -> None:
        interrupt.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, record)
    try:
        yield interrupt
    except RuntimeError:
        restore()
        if interrupt.signal is not None:
            signal.raise_signal(interrupt.signal)
        raise
    finally:
        restore()
