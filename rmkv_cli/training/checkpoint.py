"""Checkpoints: model folders with all that training needs to go on beside the weights, whole or not at all."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rmkv_cli.errors import UserError
from rmkv_cli.files import whole_directory
from rmkv_cli.model import RMKV
from rmkv_cli.model.pretrained import list_checkpoints, write_checksums
from rmkv_cli.tokenizer import Tokenizer

TRAINING = "training"
PROGRESS = Path(TRAINING) / "progress.pt"


def save_checkpoint(run: Path, step: int, fill: Callable[[Path], None], keep_last: int) -> Path:
    """Write runs/NAME/checkpoints/step-NNNNNNNN, point `latest` at it, and drop those beyond the last and the best.

    Args:
        run: its folder.
        step: number of the last one.
        fill: writes the files into the folder that it is given.
        keep_last: how many to keep.

    Raises:
        UserError: it cannot be written (a full disk); what was there before stays.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    with whole_directory(path) as aside:
        fill(aside)
        write_checksums(aside)
    _point(run / "latest", path)
    _drop_old(run, keep_last)
    return path


def go_back(run: Path, checkpoint: Path, keep_last: int) -> None:
    """Make `checkpoint` the run's newest: remove the damaged ones after it, and finish what a kill left half done."""
    for path in (run / "checkpoints").iterdir():
        if path.name.startswith(".") or path.name > checkpoint.name:
            _remove(path)
    _point(run / "latest", checkpoint)
    _drop_old(run, keep_last)


def write_model(directory: Path, model: RMKV, tokenizer: Tokenizer) -> None:
    """Fill a model folder: config, weights, tokenizer and the ids that generation starts and ends with."""
    model.save_pretrained(directory)
    tokenizer.save(directory / "tokenizer.json")
    generation = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_progress(directory: Path, progress: dict[str, Any]) -> None:
    """Put beside a model how far the training has come, plain values; raise `UserError` where there is no room."""
    path = directory / PROGRESS
    path.parent.mkdir(exist_ok=True)
    try:
        torch.save(progress, path)
    except RuntimeError as error:  # how torch reports a failed write
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def write_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Put beside a model the tensors that training goes on from, each rank its own parts; all ranks call this.

    Raises:
        UserError: on all ranks, if one of them cannot write.
    """
    path = directory / TRAINING
    with _one_line(f"{path}: cannot be written"):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=not dist.is_initialized())


def mark_best(run: Path, checkpoint: Path) -> None:
    """Point the run's `best` at a checkpoint: it is kept until a better one comes."""
    _point(run / "best", checkpoint)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return what `write_progress` was given; raise `UserError` if the checkpoint is older than that."""
    path = checkpoint / PROGRESS
    if not path.exists():
        raise UserError(
            f"{checkpoint}: an older version of rmkv wrote its {TRAINING} folder, and this one cannot go on from it; "
            f"use that version, or train again in another --run"
        )
    return torch.load(path, weights_only=True)


def read_tensors(checkpoint: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `write_tensors`, read into those that `empty` gives for a name, a shape and a type.

    However many ranks have written, each one that reads gets the parts that its empty tensors are; all ranks call this.
    """
    reader = dcp.FileSystemReader(checkpoint / TRAINING)
    tensors = {
        name: empty(name, found.size, found.properties.dtype)
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if isinstance(found, TensorStorageMetadata)
    }
    with _one_line(f"{checkpoint / TRAINING}: cannot be read"):
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Raise `UserError` on all ranks, if one of them fails in this call of distributed checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group
        try:
            yield
        except dcp.CheckpointException as failed:
            error = next(error for error, _ in failed.failures.values())
            if not isinstance(error, Exception):  # a second signal
                raise error from None
            raise UserError(f"{what}: {(str(error) or repr(error)).splitlines()[0]}") from failed


def _drop_old(run: Path, keep_last: int) -> None:
    """Remove all checkpoints but the newest `keep_last` and the best."""
    best = (run / "best").resolve()
    for old in list_checkpoints(run)[keep_last:]:
        if old.resolve() != best:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is killed half-way is hidden, and no checkpoint any more."""
    hidden = checkpoint.with_name(f".{checkpoint.name.lstrip('.')}.old")
    if checkpoint != hidden:
        shutil.rmtree(hidden, ignore_errors=True)
        checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _point(link: Path, checkpoint: Path) -> None:
    aside = link.with_name(f".{link.name}.part")
    aside.unlink(missing_ok=True)
    aside.symlink_to(checkpoint.relative_to(link.parent))
    aside.replace(link)
