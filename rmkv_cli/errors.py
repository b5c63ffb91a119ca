"""The one exception that users see, what errors say, and how the nearest right word is found."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: the message is one clear line (or one line an error) and the exit code is 2.

    It says what is wrong, where (file, line, key), and what would be right.
    """


def one_line(error: Exception) -> str:
    """Return what an error says; of the system's errors, where and why."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror.lower()}"
    return str(error)


OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "failed to map segment")
OUT_OF_THREADS = ("can't start new thread", "thread pool has not been initialized")


def explain(error: BaseException) -> str | None:
    """Return one line that says what the user can fix, or None if the error is a bug.

    Libraries have no exception class for exhausted resources: PyTorch raises a RuntimeError, and a tokenizer's thread
    pool panics.
    """
    if isinstance(error, UserError | OSError):
        return one_line(error)
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY):
        return "memory is exhausted: use a smaller model, smaller batches or shorter texts, or free some memory"
    if any(words in said for words in OUT_OF_THREADS):
        return "no more threads can be started: raise the limit (`ulimit -u`; in a container, its pids limit)"
    return None


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of rmkv from a checkout, as no package index has rmkv."""
    return f"pip install -c constraints.txt -e '.[{extra}]' (in the checkout's folder)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'slots'?" for the known word nearest to `word`, or "" if none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
