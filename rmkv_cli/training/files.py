"""The local files that a streamed run reads: on resume they have the same content, wherever they are by then."""

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
LARGEST = 16 * SMALL  # bytes of it: it says more of each file than mix.toml, which has at most SMALL


class RunFile(Section):
    """A file that a run reads."""

    source: str
    """Name of its source."""
    name: str
    """As the run's mix.toml has it."""
    path: str
    """Where it is now."""
    size: int
    mtime_ns: int
    """When it was last modified, in nanoseconds since 1970."""
    sha256: str


class RunFiles(Section):
    """All files that a run reads."""

    files: list[RunFile]


def record_files(mix: MixConfig, run: Path) -> None:
    """Write the size, time and SHA-256 of each local file of a run's mix into the run's folder."""
    named = [(source.name, name) for source in _local(mix) for name in source.files]
    if not named:
        return
    with progress("Hashing files", sum(Path(name).stat().st_size for _, name in named), "bytes") as advance:

        def record(source: str, name: str) -> RunFile:
            path = Path(name)
            found = path.stat()
            file = RunFile(
                source=source,
                name=name,
                path=name,
                size=found.st_size,
                mtime_ns=found.st_mtime_ns,
                sha256=sha256(path),
            )
            advance(file.size)
            return file

        with ThreadPoolExecutor() as threads:
            files = list(threads.map(lambda pair: record(*pair), named))
    _save(RunFiles(files=files), run)


def current_mix(mix: MixConfig, run: Path, place: Path) -> MixConfig:
    """Return a run's mix with its files where they are now; of runs of earlier versions nothing is known.

    A file whose size and time are those of the record is taken for the same, any other only if its SHA-256 is. One that
    is not at its place any more, or is another one there, is looked for among the files of the mix at `place`.

    Raises:
        UserError: a file is gone, or has changed.
    """
    if not (run / FILES).exists():
        return mix
    known = parse(RunFiles, read_json(run / FILES, LARGEST), str(run / FILES))
    moved: dict[str, list[Path]] | None = None
    files = []
    for file in known.files:
        found = _at(file, Path(file.path))
        if found is None:
            moved = _files_of(place) if moved is None else moved
            same_name = sorted(moved.get(file.source, ()), key=lambda path: path.name != Path(file.name).name)
            found = next((it for path in same_name if (it := _at(file, path))), None)
        if found is None:
            what = "has changed since the run began" if Path(file.path).exists() else "no such file"
            raise UserError(
                f"{file.path}: {what}; the run goes on with the file of {file.size:,} bytes and SHA-256 "
                f"{file.sha256[:12]}… alone: put it back, or name a mix that finds it with --mix MIX.toml"
            )
        files.append(found)
    if files != known.files:
        _save(RunFiles(files=files), run)
    places = {(file.source, file.name): file.path for file in files}
    sources = [
        source.model_copy(update={"files": [places.get((source.name, name), name) for name in source.files]})
        if isinstance(source, FileSource)
        else source
        for source in mix.sources
    ]
    return mix.model_copy(update={"sources": sources})


def _at(file: RunFile, path: Path) -> RunFile | None:
    """Return a file as it is found at a path; None if it is not the one that is found there."""
    if not path.is_file() or (found := path.stat()).st_size != file.size:
        return None
    if (str(path), found.st_mtime_ns) != (file.path, file.mtime_ns) and sha256(path) != file.sha256:
        return None
    return file.model_copy(update={"path": str(path), "mtime_ns": found.st_mtime_ns})


def _files_of(place: Path) -> dict[str, list[Path]]:
    """Return the local files that a mix finds, by source; none if there is no such mix."""
    found = {}
    for source in _local(load_mix(place)) if place.is_file() else ():
        with suppress(UserError):  # it finds none
            found[source.name] = [Path(file.name).absolute() for file in open_source(source, place.parent)]
    return found


def _local(mix: MixConfig) -> Iterator[FileSource]:
    return (source for source in mix.sources if isinstance(source, FileSource))


def _save(files: RunFiles, run: Path) -> None:
    write_text(run / FILES, files.model_dump_json(indent=2) + "\n")
