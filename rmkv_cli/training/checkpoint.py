"""Checkpoints: model folders with all that training needs to go on beside the weights, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.files import whole_directory
from rmkv_cli.model import RMKV
from rmkv_cli.model.pretrained import list_checkpoints, write_checksums
from rmkv_cli.tokenizer import Tokenizer

STATE = Path("training") / "state.pt"


def save_checkpoint(
    run: Path, step: int, model: RMKV, tokenizer: Tokenizer, training: dict[str, Any], keep_last: int
) -> Path:
    """Write runs/NAME/checkpoints/step-NNNNNNNN, point `latest` at it, and drop those beyond the last and the best.

    Raises:
        UserError: it cannot be written (a full disk); what was there before stays.
    """
    path = run / "checkpoints" / f"step-{step:08d}"
    with whole_directory(path) as aside:
        write_model(aside, model, tokenizer)
        write_training(aside, training)
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


def write_training(directory: Path, training: dict[str, Any]) -> None:
    """Put beside a model what training goes on from; raise `UserError` where there is no room."""
    path = directory / STATE
    path.parent.mkdir()
    try:
        torch.save(training, path)
    except RuntimeError as error:  # how torch reports a failed write
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def mark_best(run: Path, checkpoint: Path) -> None:
    """Point the run's `best` at a checkpoint: it is kept until a better one comes."""
    _point(run / "best", checkpoint)


def load_training(checkpoint: Path, device: str) -> dict[str, Any]:
    """Return what `save_checkpoint` was given as `training`."""
    return torch.load(checkpoint / STATE, map_location=device, weights_only=True)


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
