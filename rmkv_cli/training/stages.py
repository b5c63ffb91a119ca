"""Stages of a training run: find a step's stage and its settings."""

from dataclasses import dataclass
from itertools import accumulate

from rmkv_cli.config import TrainConfig


@dataclass(frozen=True)
class CurrentStage:
    """Stage at some point of a training run."""

    number: int
    """Index of the stage, from 0."""
    kind: str
    """"align", "distil" or "extend"; plain training counts as "extend"."""
    train: TrainConfig
    """Settings of the run with the stage's overrides."""
    begin: float
    """Start of the stage as a share of the run's tokens, 0 to 1."""
    end: float
    """End of the stage as a share of the run's tokens, 0 to 1."""

    def progress(self, run_progress: float) -> float:
        """Return the completed share of the stage for a completed share of the run."""
        return min(1.0, (run_progress - self.begin) / (self.end - self.begin))


def stage_at(config: TrainConfig, progress: float) -> CurrentStage:
    """Return the stage of a step that begins after a share `progress`, 0 to 1, of the tokens."""
    if not config.stages:
        return CurrentStage(0, "extend" if config.teacher.model is None else "distil", config, 0.0, 1.0)
    total = sum(stage.share for stage in config.stages)
    ends = [sum_ / total for sum_ in accumulate(stage.share for stage in config.stages)]
    number = next((i for i, end in enumerate(ends) if progress < end), len(ends) - 1)
    stage = config.stages[number]
    train = config.model_copy(update=stage.changes())
    return CurrentStage(number, stage.kind, train, ends[number - 1] if number else 0.0, ends[number])
