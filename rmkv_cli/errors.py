"""Errors that users see: their exception class, one-line messages and spelling suggestions."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix: reported as one line (or one line per error) with exit code 2.

    The message says what is wrong, where (file, line, key) and what to do next.
    """


def one_line(error: Exception) -> str:
    """Return an error's message; for an operating-system error, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror.lower()}"
    return str(error)


OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "failed to map segment")
OUT_OF_THREADS = ("can't start new thread", "thread pool has not been initialized")


def explain(error: BaseException) -> str | None:
    """Return a one-line message for an error that the user can fix, or None if the error is a bug.

    Libraries have no exception class for exhausted resources: PyTorch raises a RuntimeError, and the tokenizers
    library's thread pool panics.
    """
    if isinstance(error, UserError | OSError):
        return one_line(error)
    message = str(error)
    if isinstance(error, MemoryError) or any(words in message for words in OUT_OF_MEMORY):
        return "out of memory: use a smaller model, smaller batches or shorter texts, or free some memory"
    if any(words in message for words in OUT_OF_THREADS):
        return "cannot start a new thread: raise the process limit (`ulimit -u`; in a container, the pids limit)"
    return None


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of rmkv from a checkout; rmkv is not on a package index."""
    return f"pip install -c constraints.txt -e '.[{extra}]' (in the checkout's folder)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'slots'?" for the known word nearest to `word`, or "" if none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
