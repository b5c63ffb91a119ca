"""The journal of a recipe's answers, append-only; each line is on disk before its request counts as answered."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rmkv_cli.data.synthetic.requests import Answer
from rmkv_cli.errors import UserError


class Journal:
    """Answers by their requests' keys, in memory and on disk. Any thread may add one."""

    def __init__(self, path: Path, file: int) -> None:
        """Read the journal from an open file, and remove an incomplete last line.

        Raises:
            UserError: another line is damaged.
        """
        self.answers: dict[str, Answer] = {}
        self._path, self._file, self._lock = path, file, threading.Lock()
        self._size = 0
        with open(os.dup(file), "rb") as lines:  # noqa: PTH123
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    key = str(entry.pop("key"))
                    self.answers[key] = Answer(**entry)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    raise UserError(
                        f"{path}:{number}: is damaged; remove this line to send its request again"
                    ) from None
                self._size += len(line)
        os.ftruncate(file, self._size)

    def add(self, key: str, answer: Answer) -> None:
        """Write an answer to disk before returning; if that fails, leave nothing of it."""
        line = json.dumps({"key": key} | asdict(answer)).encode() + b"\n"
        with self._lock:
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    os.write(self._file, line[written:])  # raises the error that the first call did not report
                os.fsync(self._file)
            except BaseException as error:
                os.ftruncate(self._file, self._size)
                if isinstance(error, OSError):
                    error.filename = str(self._path)
                raise
            self._size += len(line)
            self.answers[key] = answer


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Yield the journal at `path`, created if missing and locked against other processes.

    Raises:
        UserError: another process has locked it, or it is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: is in use by another process; wait for it or choose another --out") from None
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        yield Journal(path, file)
    finally:
        os.close(file)
