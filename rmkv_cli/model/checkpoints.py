"""A run's checkpoints: their names, by which rmkv knows what is its own in the folder, and their list."""

import re
from pathlib import Path

FOLDER = "checkpoints"


def checkpoint_path(run: Path, step: int) -> Path:
    """Return where a run keeps the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """Return the step of the checkpoint that a path names, or None: the name is not one that rmkv gives."""
    match = re.fullmatch(r"step-([0-9]{8}|[1-9][0-9]{8,})", path.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first: folders, or links to them, whose names rmkv gives."""
    if not (run / FOLDER).is_dir():
        return []
    folders = (path for path in (run / FOLDER).iterdir() if path.is_dir() or path.is_symlink())
    steps = {step: path for path in folders if (step := checkpoint_step(path)) is not None}
    return [steps[step] for step in sorted(steps, reverse=True)]


def list_leftovers(run: Path) -> list[Path]:
    """Return the hidden folders that a kill left of checkpoints which were being written or removed."""
    hidden = r"\.step-[0-9]{8,}(\.[0-9]+\.part)?(\.old)?"
    return [path for path in (run / FOLDER).iterdir() if re.fullmatch(hidden, path.name)]
