"""Training: the loop, the optimizer and its schedule, checkpoints, metrics."""

from rmkv_cli.training.distribution import resolve_device
from rmkv_cli.training.faults import BadStepError
from rmkv_cli.training.loop import Outcome, train
from rmkv_cli.training.trial import dry_run, profile

__all__ = ["BadStepError", "Outcome", "dry_run", "profile", "resolve_device", "train"]
