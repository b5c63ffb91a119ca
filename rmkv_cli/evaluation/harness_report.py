"""Scores in the tasks of lm-evaluation-harness, which need not be installed to read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task, or of a group of tasks."""

    task: str
    version: str | None
    """Scores of different versions of a task are not comparable. None: the task, or group, tells of none."""
    num_fewshot: int | None
    """Solved examples before each question. None: a group whose tasks differ."""
    documents: int
    """Those that were asked."""
    metric: str
    filter: str
    """What was done to the answers before they were judged; "none"."""
    value: float
    standard_error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessReport:
    """What lm-evaluation-harness found."""

    lm_eval: str
    """Its version."""
    limit: int | None
    """Only so many documents of each task were asked: such scores are for trying things out."""
    scores: list[HarnessScore]
