"""Atomic writing and checked reading of files. Writing goes to a temporary path, then fsync, then rename."""

import codecs
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rmkv_cli.errors import UserError

SMALL = 64 << 20
"""Maximum bytes of a config, manifest or report. A run's mix.toml may name half a million files."""
LARGE = 8 << 30
"""Maximum bytes of a line-based file that is read into memory: metrics of a run, prompts, texts."""


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _report_as(path: Path, temporary: Path) -> Iterator[None]:
    """Make operating-system errors name `path`, which the user knows, instead of the temporary path."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(temporary), str(path))
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` after an fsync on success, remove it on failure.

    The file's permissions follow the umask, even if a library such as safetensors restricts them to the owner.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _report_as(path, temporary):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _is_another_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return pid != os.getpid()


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `path` after an fsync on success, remove it on failure.

    The next process that writes `path` removes temporary folders that killed processes left behind.

    Raises:
        UserError: another process created `path` in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = leftover.name.removeprefix(f".{path.name}.").removesuffix(".part")
        if pid.isdecimal() and not _is_another_process(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _report_as(path, temporary):
        temporary.mkdir()
    try:
        with _report_as(path, temporary):
            yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _fsync(entry)
        try:
            temporary.rename(path)
        except OSError:
            require_new(path)
            raise
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """Return a file's SHA-256 in hexadecimal; call `advance` with the number of bytes of each read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


def require_new(path: Path) -> None:
    """Raise `UserError` if `path` exists or cannot be created, so that no result is overwritten or lost.

    Call this before the work whose result goes to `path`.
    """
    if os.path.lexists(path):  # true for a broken symbolic link as well
        raise UserError(f"{path}: already exists; remove it or choose another name")
    require_writable(path)


def require_writable(path: Path) -> None:
    """Raise `UserError` if no file or folder can be created at `path`. An existing `path` is ignored and untouched."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({folder}: {error.strerror}); choose another place") from None


def require_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise `UserError` unless `path` is a non-empty file of at most `max_bytes` bytes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: is not a file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: is empty")
    if max_bytes is not None and size > max_bytes:
        raise UserError(f"{path}: has {size:,} bytes; a file of this kind has at most {max_bytes:,}")


def read_whole(path: Path, max_bytes: int = SMALL) -> bytes:
    """Return the bytes of a file.

    Raises:
        UserError: `path` is not a regular file, is empty, or has more than `max_bytes` bytes.
    """
    require_file(path, max_bytes)
    return path.read_bytes()


def read_json(path: Path, max_bytes: int = SMALL) -> dict[str, Any]:
    """Return the JSON object in a file; raise `UserError` if it holds none, or as `read_whole` does."""
    data = read_whole(path, max_bytes)
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is damaged: not a JSON object")
    return value


POINTERS = {
    b"version https://git-lfs.github.com/spec/": "git-lfs pointer, not the file itself; fetch that with `git lfs pull`",
    b"/annex/objects/": "git-annex pointer, not the file itself; fetch that with `git annex get`",
}
HEAD = 64
"""Number of first bytes that identify a pointer or an encoding."""


def file_fault(head: bytes) -> str | None:
    """Return what is wrong with a file that begins with `head` if it is only a pointer to the real file, else None."""
    return next((f"is a {what}" for begin, what in POINTERS.items() if head.startswith(begin)), None)


def text_fault(head: bytes) -> str | None:
    """Return what is wrong with a text that begins with `head` if it is UTF-16, UTF-32 or a pointer, else None."""
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or any(
        len(zeros) > 1 and not any(zeros) and all(others)
        for zeros, others in ((head[::2], head[1::2]), (head[1::2], head[::2]))
    )
    if not wide:
        return file_fault(head)
    kind = "UTF-32" if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "UTF-16"
    return f"is {kind}, where UTF-8 is expected; convert it: iconv -f {kind} -t UTF-8 FILE > NEW"
