"""Checks before training that a run's folder is writable and has room for its checkpoints."""

import shutil
import tempfile
from pathlib import Path

from rmkv_cli.config import Config
from rmkv_cli.errors import UserError
from rmkv_cli.model.checkpoints import list_checkpoints
from rmkv_cli.model.cost import count_by_part, count_trained, optimizer_bytes, state_bytes


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a checkpoint in bytes: float32 weights, the optimizer's moments, and the states of all lanes.

    A run that trains an adapter saves only the adapter's weights. Tokenizer, configs and the lanes' open documents are
    small and not counted.
    """
    model, train = config.model, config.train
    state, _ = state_bytes(model, 4, 2 if train.precision == "bf16" else 4)
    saved = count_trained(model, train) if train.trainable == "adapters" else count_by_part(model)
    weights = 4 * sum(saved.values())
    return weights + optimizer_bytes(model, train) + train.batch_size * state


def remaining_checkpoints(config: Config, run: Path) -> int:
    """Return how many checkpoints a run may still add, up to `keep_last`, the best, and one being written."""
    return max(1, config.train.keep_last + 2 - len(list_checkpoints(run)))


def free_bytes(run: Path) -> int:
    """Return the free bytes of the disk of the run's folder, which may not exist yet."""
    return shutil.disk_usage(_existing(run)).free


def require_disk(config: Config, run: Path) -> None:
    """Raise `UserError` if the run's folder, which may not exist yet, is not writable or lacks room for checkpoints."""
    folder = _existing(run)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --run") from None
    number, free = remaining_checkpoints(config, run), free_bytes(run)
    needed = number * checkpoint_bytes(config)
    if needed > free:
        raise UserError(
            f"{run}: {number} checkpoints need {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free; make room, "
            f"lower train.keep_last ({config.train.keep_last}), or choose another --run"
        )


def _existing(run: Path) -> Path:
    """Return the folder of checkpoints, or its nearest existing parent."""
    return next(path for path in (run / "checkpoints", run, *run.absolute().parents) if path.exists())
