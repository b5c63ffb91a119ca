"""Ctrl-C and SIGTERM end a command at once while it imports, and else by an exception that lets it clean up.

Only the standard library is imported here, so that this is in place before anything else of the command.
"""

import os
import signal
from types import FrameType

IMPORT = "<frozen importlib._bootstrap>"  # what Python's frames of an import are from


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """End with exit code 128 + `number`, as a signal's handler.

    Libraries swallow exceptions that are raised while they are imported, and an import takes seconds. Nothing is open
    then, so the process ends without one.
    """
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            os._exit(128 + number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def handle_signals() -> None:
    """Let SIGINT and SIGTERM end this process by `end_by_signal`, but for one that its parent has it ignore."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_by_signal)
