"""Create a mix of one source from a plain folder or file of texts."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rmkv_cli.config import FileSource, MixConfig
from rmkv_cli.data.files import NO_RECORDS
from rmkv_cli.data.manifest import FILE
from rmkv_cli.data.records import suffix
from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr


def mix_of(path: Path) -> tuple[MixConfig, Path]:
    """Return a mix whose one source is a file or a folder's files, and the folder that its patterns are relative to.

    Report the source's files on stderr. In a folder, hidden files and unreadable records are skipped.

    Raises:
        UserError: the folder contains no text, or is a prepared mix.
    """
    name = path.resolve().name or "texts"  # the root has no name
    if path.is_dir():
        source = FileSource(kind="files", name=name, weight=1, files=_patterns(path))
        return MixConfig(sources=[source], on_error="skip"), path
    stderr().print(f"{path}: using this file as a mix of one source", style="dim")
    return MixConfig(sources=[FileSource(kind="files", name=name, weight=1, files=[path.name])]), path.parent


def _patterns(folder: Path) -> list[str]:
    """Return a pattern for each suffix in the folder, and the names of the files without a suffix."""
    if (folder / FILE).is_file():
        raise UserError(f"{folder}: is already a prepared mix; train on it with `rmkv train --data {folder}`")
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # `datasets` wrote this folder
        return ["."]
    names = list(_names(folder))
    taken = [name for name in names if suffix(name) not in NO_RECORDS]
    if not taken:
        raise UserError(f"{folder}: has no text files")
    kinds = Counter(sorted(_suffixes(name) for name in taken))
    counts = ", ".join(f"{count:,} {kind or 'without a suffix'}" for kind, count in kinds.most_common())
    skipped = f"; skipping {len(names) - len(taken):,} of JSON" if len(taken) < len(names) else ""
    stderr().print(f"{folder}: using these files as a mix of one source: {counts}{skipped}", style="dim")
    without = sorted(glob.escape(name) for name in taken if not _suffixes(name))
    return [*(f"**/*{glob.escape(kind)}" for kind in kinds if kind), *without]


def _names(folder: Path) -> Iterator[str]:
    """Yield the paths of the files below a folder, relative to it, except hidden ones."""
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(Path(where, name), folder) for name in files if not name.startswith("."))


def _suffixes(name: str) -> str:
    """Return a file's suffix; for a compressed file, both suffixes."""
    path = Path(name)
    return path.with_suffix("").suffix + path.suffix if path.suffix == ".gz" else path.suffix
