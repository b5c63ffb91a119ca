"""Checkpoints: model folders with all that training needs to go on beside the weights, whole or not at all."""

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_directory
from rmkv_cli.generation.sampling import sampling_defaults
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapter_file import save_adapter
from rmkv_cli.model.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints, list_leftovers
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.tensors import TRAINING

PROGRESS = Path(TRAINING) / "progress.pt"


def save_checkpoint(
    run: Path,
    step: int,
    fill: Callable[[Path], Callable[[], None]],
    background: Executor,
    keep_last: int,
    best: int | None,
) -> Future[None]:
    """Begin to write runs/NAME/checkpoints/step-NNNNNNNN. When it is whole, point `latest` at it, and drop those beyond
    the last and the best.

    Args:
        run: its folder.
        step: number of the last one.
        fill: copies what will change into memory, and returns a function that writes the files into the folder.
        background: where the files are written and hashed.
        keep_last: how many to keep.
        best: the step of the best checkpoint, which is kept as well; None if there is none.

    Returns:
        the end of all that. It raises `UserError` if the files cannot be written (a full disk); what was there before
        stays.
    """
    path = checkpoint_path(run, step)
    with ExitStack() as stack:
        aside = stack.enter_context(atomic_directory(path))
        write = fill(aside)
        whole = stack.pop_all()

    def end() -> None:
        with whole:
            write()
            write_checksums(aside)
        _link(run / "latest", path)
        _prune(run, keep_last, best)

    return background.submit(end)


def rewind(run: Path, checkpoint: Path, keep_last: int, best: int | None) -> None:
    """Make `checkpoint` the run's newest: remove damaged newer ones and the leftovers of a killed process.

    Leave everything else in the folder alone. `keep_last` and `best` are as in `save_checkpoint`.

    Raises:
        UserError: a damaged checkpoint cannot be removed, and training will need its path.
    """
    for leftover in list_leftovers(run):
        _remove(leftover)
    checkpoints = list_checkpoints(run)
    for damaged in checkpoints[: checkpoints.index(checkpoint)]:
        _remove(damaged)
        if os.path.lexists(damaged):
            raise UserError(f"{damaged}: is damaged, and training will write it again; move it out of the way")
    _link(run / "latest", checkpoint)
    if best is not None and checkpoint_path(run, best).exists():
        mark_best(run, best)
    _prune(run, keep_last, best)


def write_model(directory: Path, model: RMKV, tokenizer: Tokenizer) -> None:
    """Write a model folder: config, weights, tokenizer and generation config."""
    model.save_pretrained(directory)
    _write_tokenizer(directory, tokenizer)


def write_adapter(directory: Path, model: RMKV, tokenizer: Tokenizer, base: Path, base_sha256: str) -> None:
    """Write an adapter folder that names its base model, and beside the adapter what a model folder has."""
    save_adapter(model, directory, base, base_sha256)
    _write_tokenizer(directory, tokenizer)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(directory / "tokenizer.json")
    generation = tokenizer.generation_ids() | sampling_defaults()
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
    _link(run / "best", checkpoint_path(run, step))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the values of `write_progress`; raise `UserError` if they are damaged or an older version wrote them."""
    path = checkpoint / PROGRESS
    if not path.exists():
        raise UserError(
            f"{checkpoint}: an older version of rmkv wrote its {TRAINING} folder, and this one cannot go on from it; "
            f"use that version, or start a new run with another --run"
        )
    try:
        progress: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{path}: is damaged: {str(error).partition(chr(10))[0]}") from None
    return progress


def _prune(run: Path, keep_last: int, best: int | None) -> None:
    """Remove all checkpoints except the newest `keep_last`, the best, and the target of the link `best`."""
    linked = (run / "best").resolve()
    for old in list_checkpoints(run)[keep_last:]:
        if checkpoint_step(old) != best and old.resolve() != linked:
            _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint or the leftovers of one; print a warning if that fails.

    A checkpoint is renamed to a hidden name first, so that a partly removed one is never taken for a checkpoint. Only a
    link itself is removed, not its target.
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
    """Return the path of a checkpoint during its removal."""
    return checkpoint.with_name(f".{checkpoint.name}.old")


def _link(link: Path, checkpoint: Path) -> None:
    """Point a link of the run at a checkpoint; if that fails, print a warning and change nothing.

    Copying a run with `cp -rL` replaces the link by a copy of the checkpoint. The link replaces that copy again if the
    run has the same checkpoint, byte for byte.
    """
    aside = link.with_name(f".{link.name}.part")
    try:
        if link.is_dir() and not link.is_symlink():
            for original in list_checkpoints(link.parent):
                if _same_files(link, original):
                    _remove(link.rename(_hidden(original)))
                    break
        if link.exists() and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, "something else has its name")
        aside.unlink(missing_ok=True)
        aside.symlink_to(checkpoint.relative_to(link.parent))
        aside.replace(link)
    except OSError as error:
        _warn(link, error, f"{link} cannot be made a link to {checkpoint.name}; training does not need it")


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two folders have the same files, byte for byte."""
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, other)]
    files = [str(name) for name in names[0] if not (one / name).is_dir()]
    return names[0] == names[1] and len(filecmp.cmpfiles(one, other, files, shallow=False)[0]) == len(files)


_warned: set[tuple[Path, int | None]] = set()


def _warn(place: Path, error: OSError, consequence: str) -> None:
    """Print a warning, once for each place and reason; training continues."""
    if (place, error.errno) not in _warned:
        _warned.add((place, error.errno))
        stderr().print(f"warning: {consequence} ({(error.strerror or str(error)).lower()})", style="yellow")
