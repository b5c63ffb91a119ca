"""Stages of a training run: the stage that a step belongs to, and the settings that apply in it."""

from dataclasses import dataclass
from itertools import accumulate

from rmkv_cli.config import TrainConfig


@dataclass(frozen=True)
class CurrentStage:
    """The stage at some point of a training run."""

    number: int
    kind: str
    """"align", "distil" or "extend"; plain training counts as "extend"."""
    train: TrainConfig
    """The run's settings, with the stage's changes."""
    begin: float
    end: float
    """Shares of the run's tokens, 0 to 1."""

    def progress(self, of_run: float) -> float:
        """Return the completed share of the stage at the completed share `of_run` of the run."""
        return min(1.0, (of_run - self.begin) / (self.end - self.begin))


def stage_at(config: TrainConfig, progress: float) -> CurrentStage:
    """Return the stage of a step that begins after a share `progress` (0 to 1) of the tokens."""
    if not config.stages:
        return CurrentStage(0, "extend" if config.teacher.model is None else "distil", config, 0.0, 1.0)
    whole = sum(stage.share for stage in config.stages)
    ends = [sum_ / whole for sum_ in accumulate(stage.share for stage in config.stages)]
    number = next((i for i, end in enumerate(ends) if progress < end), len(ends) - 1)
    stage = config.stages[number]
    train = config.model_copy(update=stage.changes())
    return CurrentStage(number, stage.kind, train, ends[number - 1] if number else 0.0, ends[number])
