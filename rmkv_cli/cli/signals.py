"""Let Ctrl-C and SIGTERM end a command: at once during imports, otherwise by an exception that lets it clean up.

This module imports only the standard library, so that the handlers are installed before all other imports.
"""

import os
import signal
from types import FrameType

IMPORT = "<frozen importlib._bootstrap>"  # file name of the frames of an import


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """Handle a signal by ending the process with exit code 128 + `number`.

    An import takes seconds, and libraries swallow exceptions raised during their import. Nothing is open then, so the
    process ends without an exception.
    """
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            os._exit(128 + number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def handle_signals() -> None:
    """Install `end_by_signal` for SIGINT and SIGTERM, except for a signal that the parent process set to be ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_by_signal)
