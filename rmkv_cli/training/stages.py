"""The stages of a training: which of them a step belongs to, and what holds in it."""

from dataclasses import dataclass
from itertools import accumulate

from rmkv_cli.config import TrainConfig


@dataclass(frozen=True)
class CurrentStage:
    """The stage at some point of a training."""

    number: int
    kind: str
    """"align", "distil" or "extend", which stands for plain training as well."""
    train: TrainConfig
    """The run's, with what the stage changes."""
    begin: float
    end: float
    """Shares of the run's tokens, 0 to 1."""

    def progress(self, of_run: float) -> float:
        """Return which share of the stage has passed when that share of the run has."""
        return min(1.0, (of_run - self.begin) / (self.end - self.begin))


def stage_at(config: TrainConfig, progress: float) -> CurrentStage:
    """Return the stage that a step belongs to which begins when a share `progress` (0 to 1) of the tokens is read."""
    if not config.stages:
        return CurrentStage(0, "extend" if config.teacher.model is None else "distil", config, 0.0, 1.0)
    whole = sum(stage.share for stage in config.stages)
    ends = [sum_ / whole for sum_ in accumulate(stage.share for stage in config.stages)]
    number = next((i for i, end in enumerate(ends) if progress < end), len(ends) - 1)
    stage = config.stages[number]
    train = config.model_copy(update=stage.changes())
    return CurrentStage(number, stage.kind, train, ends[number - 1] if number else 0.0, ends[number])
