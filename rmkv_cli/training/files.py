"""Record a streamed run's local files, and find the same content on resume even if files were moved."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from rmkv_cli.config import FileSource, MixConfig, Section, load_mix, parse
from rmkv_cli.data.sources import open_source
from rmkv_cli.errors import UserError
from rmkv_cli.files import SMALL, read_json, sha256, write_text
from rmkv_cli.progress import progress

FILES = "files.json"
LARGEST = 16 * SMALL  # largest size of files.json in bytes; mix.toml, with less about each file, has at most SMALL


class RunFile(Section):
    """A local file that a run reads."""

    source: str
    """Name of the source."""
    name: str
    """Path of the file in the run's mix.toml."""
    path: str
    """Current path of the file."""
    size: int
    """Size in bytes."""
    mtime_ns: int
    """Time of the last modification, in nanoseconds since 1970."""
    sha256: str
    """SHA-256 of the content."""


class RunFiles(Section):
    """All local files that a run reads: the content of files.json."""

    files: list[RunFile]


def record_files(mix: MixConfig, run: Path) -> None:
    """Write the size, time and SHA-256 of each local file of a run's mix into the run's folder."""
    named = [(source.name, name) for source in _local(mix) for name in source.files]
    if not named:
        return
    stopped = threading.Event()
    with progress("Hashing files", sum(Path(name).stat().st_size for _, name in named), "bytes") as advance:

        def count(size: int) -> None:
            if stopped.is_set():
                raise InterruptedError
            advance(size)

        def record(source: str, name: str) -> RunFile:
            path = Path(name)
            found = path.stat()
            return RunFile(
                source=source,
                name=name,
                path=name,
                size=found.st_size,
                mtime_ns=found.st_mtime_ns,
                sha256=sha256(path, count),
            )

        with ThreadPoolExecutor() as threads:
            try:
                files = list(threads.map(lambda pair: record(*pair), named))
            finally:  # a signal interrupts only the main thread, so stop the others
                stopped.set()
    _save(RunFiles(files=files), run)


def current_mix(mix: MixConfig, run: Path, mix_file: Path) -> MixConfig:
    """Return a run's mix with the current paths of its files. Runs of earlier versions have no record of files.

    A file is the same if its size and time, or else its SHA-256, match the record. A file that is missing or different
    is searched for among the files of the mix in `mix_file`.

    Raises:
        UserError: a file is missing or has changed.
    """
    if not (run / FILES).exists():
        return mix
    known = parse(RunFiles, read_json(run / FILES, LARGEST), str(run / FILES))
    moved: dict[tuple[str, int], list[Path]] | None = None
    files = []
    for file in known.files:
        found = _at(file, Path(file.path))
        if found is None:
            moved = _files_of(mix_file) if moved is None else moved
            file_name = Path(file.name).name
            same_size = sorted(moved.get((file.source, file.size), ()), key=lambda path: path.name != file_name)
            found = next((match for path in same_size if (match := _at(file, path))), None)
        if found is None:
            what = "has changed since the run began" if Path(file.path).exists() else "no such file"
            raise UserError(
                f"{file.path}: {what}; the run needs the file of {file.size:,} bytes with SHA-256 "
                f"{file.sha256[:12]}…: restore it, or give a mix that finds it with --mix MIX.toml"
            )
        files.append(found)
    if files != known.files:
        _save(RunFiles(files=files), run)
    paths = {(file.source, file.name): file.path for file in files}
    sources = [
        source.model_copy(update={"files": [paths.get((source.name, name), name) for name in source.files]})
        if isinstance(source, FileSource)
        else source
        for source in mix.sources
    ]
    return mix.model_copy(update={"sources": sources})


def _at(file: RunFile, path: Path) -> RunFile | None:
    """Return the record of a file with a new path; None if that path has another file or none."""
    if not path.is_file() or (found := path.stat()).st_size != file.size:
        return None
    if (str(path), found.st_mtime_ns) != (file.path, file.mtime_ns) and sha256(path) != file.sha256:
        return None
    return file.model_copy(update={"path": str(path), "mtime_ns": found.st_mtime_ns})


def _files_of(mix_file: Path) -> dict[tuple[str, int], list[Path]]:
    """Return the local files of a mix by source and size; empty if the mix does not exist."""
    found = defaultdict(list)
    for source in _local(load_mix(mix_file)) if mix_file.is_file() else ():
        with suppress(UserError):  # no file matches
            for file in open_source(source, mix_file.parent):
                path = Path(file.name).absolute()
                found[source.name, path.stat().st_size].append(path)
    return found


def _local(mix: MixConfig) -> Iterator[FileSource]:
    return (source for source in mix.sources if isinstance(source, FileSource))


def _save(files: RunFiles, run: Path) -> None:
    write_text(run / FILES, files.model_dump_json(indent=2) + "\n")
