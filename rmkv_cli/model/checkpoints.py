"""Name and list a run's checkpoints; the names distinguish rmkv's own folders from others."""

import re
from pathlib import Path

FOLDER = "checkpoints"


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of a run's checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """Return the step in a checkpoint's path, or None if rmkv gives no such name."""
    match = re.fullmatch(r"step-([0-9]{8}|[1-9][0-9]{8,})", path.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first: folders, or links to folders, with names that rmkv gives."""
    if not (run / FOLDER).is_dir():
        return []
    folders = (path for path in (run / FOLDER).iterdir() if path.is_dir() or path.is_symlink())
    steps = {step: path for path in folders if (step := checkpoint_step(path)) is not None}
    return [steps[step] for step in sorted(steps, reverse=True)]


def list_leftovers(run: Path) -> list[Path]:
    """Return the hidden folders of checkpoints that were being written or removed when rmkv was killed."""
    hidden = r"\.step-[0-9]{8,}(\.[0-9]+\.part)?(\.old)?"
    return [path for path in (run / FOLDER).iterdir() if re.fullmatch(hidden, path.name)]
