"""Files and folders that appear whole or not at all: write aside, fsync, rename."""

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
"""Most bytes of a config, manifest or report. A run's mix.toml may name half a million files."""
LARGE = 8 << 30
"""Most bytes of a file of lines that is read into memory: records of a run, prompts, texts."""


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named(path: Path, aside: Path) -> Iterator[None]:
    """Let the system's errors speak of `path`, which the user knows, instead of what is written aside."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(aside), str(path))
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success sync the file to disk and rename it to `path`, on failure remove it.

    The file's permissions follow the umask, even if a library such as safetensors restricts them to the owner.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _named(path, aside):
            aside.touch()
            mode = aside.stat().st_mode
            yield aside
        if aside.stat().st_mode != mode:
            aside.chmod(stat.S_IMODE(mode))
        _fsync(aside)
        aside.replace(path)
        _fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _is_another_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return pid != os.getpid()


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a fresh folder to fill; on success it is synced and renamed to `path`, on failure it is removed.

    A folder left aside by a killed process is cleared by the next one that writes `path`.

    Raises:
        UserError: `path` exists by the time that the folder is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = leftover.name.removeprefix(f".{path.name}.").removesuffix(".part")
        if pid.isdecimal() and not _is_another_process(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _named(path, aside):
        aside.mkdir()
    try:
        with _named(path, aside):
            yield aside
        for entry in [*aside.rglob("*"), aside]:
            _fsync(entry)
        try:
            aside.rename(path)
        except OSError:
            require_new(path)
            raise
        _fsync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; `advance` is called with the number of bytes just read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


def require_new(path: Path) -> None:
    """Raise `UserError` if `path` exists, so that no result is overwritten, or if nothing can be created there.

    Call this before the work whose result goes to `path`.
    """
    if os.path.lexists(path):  # a link that leads nowhere, too
        raise UserError(f"{path}: already exists; remove it or choose another name")
    require_writable(path)


def require_writable(path: Path) -> None:
    """Raise `UserError` if no file or folder can be created at `path`; ignore what exists there and leave no trace."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({folder}: {error.strerror}); choose another place") from None


def require_file(path: Path, most: int | None = None) -> None:
    """Raise `UserError` unless `path` is a file that is not empty and has at most `most` bytes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: is not a file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: is empty")
    if most is not None and size > most:
        raise UserError(f"{path}: has {size:,} bytes; a file of this kind has at most {most:,}")


def read_whole(path: Path, most: int = SMALL) -> bytes:
    """Return the bytes of a file.

    Raises:
        UserError: `path` is not a regular file, is empty, or has more than `most` bytes.
    """
    require_file(path, most)
    return path.read_bytes()


def read_json(path: Path, most: int = SMALL) -> dict[str, Any]:
    """Return the JSON object in a file; raise `UserError` if there is none, or as `read_whole` does."""
    data = read_whole(path, most)
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
HEAD = 64  # bytes that identify a pointer or an encoding


def why_no_file(head: bytes) -> str | None:
    """Return the fault of a file that begins with `head` if it is only a pointer to the real file, else None."""
    return next((f"is a {what}" for begin, what in POINTERS.items() if head.startswith(begin)), None)


def why_no_text(head: bytes) -> str | None:
    """Return the fault of a text that begins with `head` if it is UTF-16, UTF-32 or a pointer, else None."""
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or any(
        len(zeros) > 1 and not any(zeros) and all(others)
        for zeros, others in ((head[::2], head[1::2]), (head[1::2], head[::2]))
    )
    if not wide:
        return why_no_file(head)
    kind = "UTF-32" if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "UTF-16"
    return f"is {kind}, where UTF-8 is expected; convert it: iconv -f {kind} -t UTF-8 FILE > NEW"
