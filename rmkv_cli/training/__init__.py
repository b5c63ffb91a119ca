"""Training: the loop, the optimizer and its schedule, checkpoints, metrics."""

from rmkv_cli.training.distribution import resolve_device
from rmkv_cli.training.loop import Outcome, train
from rmkv_cli.training.trainer import NonFiniteError

__all__ = ["NonFiniteError", "Outcome", "resolve_device", "train"]
