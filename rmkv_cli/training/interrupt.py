"""Ctrl-C and SIGTERM end the step, not the run's work."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Which signal asked the training to stop, if one did."""

    signal: int | None = None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one kills as usual.

    If it was noted and the work then fails, as that of a rank does when another one died, it kills after all.
    """
    interrupt = Interrupt()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        interrupt.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    except RuntimeError:
        restore()
        if interrupt.signal is not None:
            signal.raise_signal(interrupt.signal)
        raise
    finally:
        restore()
