"""Training: the loop, the optimizer and its schedule, checkpoints, metrics."""

from rmkv_cli.training.faults import BadStepError
from rmkv_cli.training.loop import Outcome, resolve_device, train

__all__ = ["BadStepError", "Outcome", "resolve_device", "train"]
