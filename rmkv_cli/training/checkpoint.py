"""Checkpoints: model folders that also contain what training resumes from, written atomically."""

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
    """Start to write runs/NAME/checkpoints/step-NNNNNNNN; when complete, link `latest` to it and prune old checkpoints.

    Args:
        run: the run's folder.
        step: the step of the checkpoint.
        fill: function that copies what will change into memory and returns a function that writes the files.
        background: executor that writes and hashes the files.
        keep_last: number of newest checkpoints to keep.
        best: step of the best checkpoint, which is kept as well; None if there is none.

    Returns:
        A future of the completed checkpoint. It raises `UserError` if the files cannot be written, for instance to a
        full disk; earlier checkpoints then stay.
    """
    path = checkpoint_path(run, step)
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_directory(path))
        write = fill(temporary)
        complete = stack.pop_all()

    def finish() -> None:
        with complete:
            write()
            write_checksums(temporary)
        _link(run / "latest", path)
        _prune(run, keep_last, best)

    return background.submit(finish)


def rewind(run: Path, checkpoint: Path, keep_last: int, best: int | None) -> None:
    """Make `checkpoint` the run's newest: remove newer, damaged checkpoints and leftovers of a killed process.

    Other files in the folder stay. `keep_last` and `best` are as in `save_checkpoint`.

    Raises:
        UserError: a damaged checkpoint cannot be removed, although training will need its path.
    """
    for leftover in list_leftovers(run):
        _remove(leftover)
    checkpoints = list_checkpoints(run)
    for damaged in checkpoints[: checkpoints.index(checkpoint)]:
        _remove(damaged)
        if os.path.lexists(damaged):
            raise UserError(f"{damaged}: is damaged and cannot be removed, but training needs its path; move it away")
    _link(run / "latest", checkpoint)
    if best is not None and checkpoint_path(run, best).exists():
        mark_best(run, best)
    _prune(run, keep_last, best)


def write_model(directory: Path, model: RMKV, tokenizer: Tokenizer) -> None:
    """Write a model folder: config, weights, tokenizer and generation config."""
    model.save_pretrained(directory)
    _write_tokenizer(directory, tokenizer)


def write_model_folder(out: Path, model: RMKV, tokenizer: Tokenizer) -> None:
    """Write a model folder with its checksums atomically."""
    with atomic_directory(out) as temporary:
        write_model(temporary, model, tokenizer)
        write_checksums(temporary)


def write_adapter(directory: Path, model: RMKV, tokenizer: Tokenizer, base: Path, base_sha256: str) -> None:
    """Write an adapter folder: the adapter with a reference to its base model, tokenizer and generation config."""
    save_adapter(model, directory, base, base_sha256)
    _write_tokenizer(directory, tokenizer)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(directory / "tokenizer.json")
    generation = tokenizer.generation_ids() | sampling_defaults()
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_progress(directory: Path, progress: dict[str, Any]) -> None:
    """Write the training's progress, plain values, into a checkpoint; raise `UserError` if the disk is full."""
    path = directory / PROGRESS
    path.parent.mkdir(exist_ok=True)
    try:
        torch.save(progress, path)
    except RuntimeError as error:  # how torch reports a failed write
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def mark_best(run: Path, step: int) -> None:
    """Link the run's `best` to the checkpoint of a step."""
    _link(run / "best", checkpoint_path(run, step))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the progress in a checkpoint; raise `UserError` if it is damaged or from an incompatible version."""
    path = checkpoint / PROGRESS
    if not path.exists():
        raise UserError(
            f"{checkpoint}: an older version of rmkv wrote its {TRAINING} folder, and this version cannot resume "
            "from it; use that version, or start a new run with another --run"
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
    """Remove a checkpoint or its leftovers; print a warning if that fails.

    A checkpoint is first renamed to a hidden name, so that a partly removed one is never mistaken for a checkpoint. Of
    a link, only the link itself is removed.
    """
    try:
        if path.is_symlink():
            path.unlink()
            return
        if checkpoint_step(path) is not None:
            path = path.rename(_hidden(path))
        shutil.rmtree(path)
    except OSError as error:
        _warn(path.parent, error, f"{path} cannot be removed; remove it yourself, or the disk may fill up")


def _hidden(checkpoint: Path) -> Path:
    """Return the hidden path of a checkpoint during its removal."""
    return checkpoint.with_name(f".{checkpoint.name}.old")


def _link(link: Path, checkpoint: Path) -> None:
    """Link a path of the run to a checkpoint; if that fails, print a warning and change nothing.

    Copying a run with `cp -rL` replaces the link by a copy of the checkpoint. The link replaces that copy again if the
    run has the same checkpoint, byte for byte.
    """
    temporary = link.with_name(f".{link.name}.part")
    try:
        if link.is_dir() and not link.is_symlink():
            for original in list_checkpoints(link.parent):
                if _same_files(link, original):
                    _remove(link.rename(_hidden(original)))
                    break
        if link.exists() and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, "another file has its name")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.relative_to(link.parent))
        temporary.replace(link)
    except OSError as error:
        _warn(link, error, f"{link} cannot be linked to {checkpoint.name}; training continues without it")


def _same_files(one: Path, other: Path) -> bool:
    """Return whether two folders have the same files, byte for byte."""
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, other)]
    files = [str(name) for name in names[0] if not (one / name).is_dir()]
    return names[0] == names[1] and len(filecmp.cmpfiles(one, other, files, shallow=False)[0]) == len(files)


_warned: set[tuple[Path, int | None]] = set()


def _warn(location: Path, error: OSError, consequence: str) -> None:
    """Print a warning once per location and reason; training continues."""
    if (location, error.errno) not in _warned:
        _warned.add((location, error.errno))
        stderr().print(f"warning: {consequence} ({(error.strerror or str(error)).lower()})", style="yellow")
