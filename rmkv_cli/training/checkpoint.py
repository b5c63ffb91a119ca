"""Checkpoints: model folders with all that training needs to go on beside the weights, whole or not at all."""

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.files import whole_directory
from rmkv_cli.generation.sampling import sampling_defaults
from rmkv_cli.model import RMKV
from rmkv_cli.model.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints, list_leftovers
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.tensors import TRAINING

PROGRESS = Path(TRAINING) / "progress.pt"


def save_checkpoint(run: Path, step: int, fill: Callable[[Path], None], keep_last: int, best: int | None) -> None:
    """Write runs/NAME/checkpoints/step-NNNNNNNN, point `latest` at it, and drop those beyond the last and the best.

    Args:
        run: its folder.
        step: number of the last one.
        fill: writes the files into the folder that it is given.
        keep_last: how many to keep.
        best: the step that is kept besides, if there is one.

    Raises:
        UserError: it cannot be written (a full disk); what was there before stays.
    """
    path = checkpoint_path(run, step)
    with whole_directory(path) as aside:
        fill(aside)
        write_checksums(aside)
    _point(run / "latest", path)
    _drop_old(run, keep_last, best)


def go_back(run: Path, checkpoint: Path, keep_last: int, best: int | None) -> None:
    """Make `checkpoint` the run's newest: remove the damaged ones after it, and finish what a kill left half done.

    Other things in the folder are left alone. `keep_last` and `best` are as in `save_checkpoint`.

    Raises:
        UserError: a damaged checkpoint stands where training will write one, and cannot be removed.
    """
    for leftover in list_leftovers(run):
        _remove(leftover)
    checkpoints = list_checkpoints(run)
    for damaged in checkpoints[: checkpoints.index(checkpoint)]:
        _remove(damaged)
        if os.path.lexists(damaged):
            raise UserError(f"{damaged}: is damaged, and training will write it again; move it out of the way")
    _point(run / "latest", checkpoint)
    if best is not None and checkpoint_path(run, best).exists():
        mark_best(run, best)
    _drop_old(run, keep_last, best)


def write_model(directory: Path, model: RMKV, tokenizer: Tokenizer) -> None:
    """Fill a model folder: config, weights, tokenizer, and how to generate."""
    model.save_pretrained(directory)
    tokenizer.save(directory / "tokenizer.json")
    generation = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod} | sampling_defaults()
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_progress(directory: Path, progress: dict[str, Any]) -> None:
    """Put beside a model how far the training has come, plain values; raise `UserError` where there is no room."""
    path = directory / PROGRESS
    path.parent.mkdir(exist_ok=True)
    try:
        torch.save(progress, path)
    except RuntimeError as error:  # how torch reports a failed write
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def mark_best(run: Path, step: int) -> None:
    """Point the run's `best` at the checkpoint of a step."""
    _point(run / "best", checkpoint_path(run, step))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return what `write_progress` was given; raise `UserError` if the checkpoint is older than that, or damaged."""
    path = checkpoint / PROGRESS
    if not path.exists():
        raise UserError(
            f"{checkpoint}: an older version of rmkv wrote its {TRAINING} folder, and this one cannot go on from it; "
            f"use that version, or train again in another --run"
        )
    try:
        progress: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever it stumbles over
        raise UserError(f"{path}: is damaged: {str(error).partition(chr(10))[0]}") from None
    return progress


def _drop_old(run: Path, keep_last: int, best: int | None) -> None:
    """Remove all checkpoints but the newest `keep_last`, the best, and that which the link `best` leads to."""
    linked = (run / "best").resolve()
    for old in list_checkpoints(run)[keep_last:]:
        if checkpoint_step(old) != best and old.resolve() != linked:
            _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint, or what a kill left of one; where that fails it stays, with a warning.

    A checkpoint is hidden first: if a kill comes half-way, what is left is no checkpoint any more. Of a link to one,
    only the link is removed.
    """
    try:
        if path.is_symlink():
            path.unlink()
            return
        if checkpoint_step(path) is not None:
            path = path.rename(_hidden(path))
        shutil.rmtree(path)
    except OSError as error:
        _warn(path.parent, error, f"{path} cannot be removed and stays; remove it, or the disk may fill up")


def _hidden(checkpoint: Path) -> Path:
    """Return the name of a checkpoint that is being removed."""
    return checkpoint.with_name(f".{checkpoint.name}.old")


def _point(link: Path, checkpoint: Path) -> None:
    """Make a link of the run lead to a checkpoint; where that fails, what is there stays, with a warning.

    In a run that was copied with its links followed (`cp -rL`), a copy of a checkpoint stands in the link's place. It
    makes way for the link if the run holds the same checkpoint, byte for byte.
    """
    aside = link.with_name(f".{link.name}.part")
    try:
        if link.is_dir() and not link.is_symlink():
            for original in list_checkpoints(link.parent):
                if _same_files(link, original):
                    _remove(link.rename(_hidden(original)))
                    break
        if link.exists() and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, "it is something else, which stays")
        aside.unlink(missing_ok=True)
        aside.symlink_to(checkpoint.relative_to(link.parent))
        aside.replace(link)
    except OSError as error:
        _warn(link, error, f"{link} cannot be made a link to {checkpoint.name}; training does not need it")


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same files, byte for byte, and nothing else."""
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, other)]
    files = [str(name) for name in names[0] if not (one / name).is_dir()]
    return names[0] == names[1] and len(filecmp.cmpfiles(one, other, files, shallow=False)[0]) == len(files)


_warned: set[tuple[Path, int | None]] = set()


def _warn(place: Path, error: OSError, consequence: str) -> None:
    """Say what cannot be done and why, once for each place and reason: training continues."""
    if (place, error.errno) not in _warned:
        _warned.add((place, error.errno))
        stderr().print(f"warning: {consequence} ({(error.strerror or str(error)).lower()})", style="yellow")
