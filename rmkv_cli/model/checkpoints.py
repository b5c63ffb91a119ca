"""Names and lists of a run's checkpoints. Folders with other names are not rmkv's and are ignored."""

import re
from pathlib import Path

FOLDER = "checkpoints"


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of a run's checkpoint at a step."""
    return run / FOLDER / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """Return the step in a checkpoint's path, or None if the name is not one of rmkv's."""
    match = re.fullmatch(r"step-([0-9]{8}|[1-9][0-9]{8,})", path.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first: folders with rmkv's names, or links to folders."""
    if not (run / FOLDER).is_dir():
        return []
    folders = (path for path in (run / FOLDER).iterdir() if path.is_dir() or path.is_symlink())
    steps = {step: path for path in folders if (step := checkpoint_step(path)) is not None}
    return [steps[step] for step in sorted(steps, reverse=True)]


def list_leftovers(run: Path) -> list[Path]:
    """Return the hidden folders that remain if rmkv was killed while it wrote or removed checkpoints."""
    hidden = r"\.step-[0-9]{8,}(\.[0-9]+\.part)?(\.old)?"
    return [path for path in (run / FOLDER).iterdir() if re.fullmatch(hidden, path.name)]
