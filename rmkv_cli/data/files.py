"""Find the local files of a source."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from rmkv_cli.data.records import File, suffix
from rmkv_cli.errors import UserError
from rmkv_cli.files import read_json

NO_RECORDS = {".json", ".ndjson"}  # suffixes of files that may hold one record, many records or a text


def find_files(patterns: Sequence[str], base: Path) -> list[File]:
    """Return the files that paths and globs relative to `base` match, sorted within each pattern; `**` crosses folders.

    A path that exists is never treated as a pattern. A file that is found in several ways, for instance through links,
    counts once, under the first name found. A folder that `datasets` saved to disk stands for the files in it.

    Raises:
        UserError: a pattern matches nothing, or a file is JSON that is not line-based.
    """
    found: dict[Path, File] = {}
    for pattern in patterns:
        literal = base / pattern
        if (literal / "state.json").is_file():
            files = _saved_to_disk(literal)
        else:
            files = sorted(filter(Path.is_file, _matches(base, Path(pattern).parts)), key=str)
        if not files:
            what = f"is a folder; name its files, such as {pattern}/**/*.txt" if literal.is_dir() else "no such file"
            if (literal / "dataset_dict.json").is_file():
                what = f"contains a folder for each split; name one, such as {pattern}/train"
            raise UserError(f"{literal}: {what}")
        for path in files:
            if suffix(path.name) in NO_RECORDS:
                raise UserError(f"{path}: is ambiguous; name it .jsonl if each line is a record, or .txt if it is text")
            found.setdefault(path.resolve(), File.local(path))
    return list(found.values())


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the paths in a folder that match a pattern's parts, as `glob` does, but do not follow loops of links."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if (folder / first).exists():
        yield from _matches(folder / first, rest)
    elif first == "**":
        for inner in _folders(folder):
            yield from _matches(inner, rest or ["*"])
    else:
        for name in _names(folder):
            if fnmatchcase(name, first) and (first.startswith(".") or not name.startswith(".")):
                yield from _matches(folder / name, rest)


def _folders(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield a folder and its subfolders, except hidden folders and links back to a parent."""
    if not folder.is_dir() or (real := folder.resolve()) in above:
        return
    yield folder
    for name in _names(folder):
        if not name.startswith("."):
            yield from _folders(folder / name, above | {real})


def _names(folder: Path) -> list[str]:
    """Return a folder's entries; none if the path is not a folder or cannot be read."""
    with suppress(OSError):
        return [path.name for path in folder.iterdir()]
    return []


def _saved_to_disk(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote."""
    path = folder / "state.json"
    try:
        return [folder / file["filename"] for file in read_json(path)["_data_files"]]
    except (LookupError, TypeError):
        raise UserError(f"{path}: is not a file that `datasets.Dataset.save_to_disk` wrote") from None
