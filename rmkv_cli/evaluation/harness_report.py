"""Scores in the tasks of lm-evaluation-harness; reading them does not require the harness."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task, or of a group of tasks."""

    task: str
    version: str | None
    """Version of the task; scores of different versions are not comparable. None if the task or group has none."""
    num_fewshot: int | None
    """Number of solved examples before each question; None for a group whose tasks differ."""
    documents: int
    """Number of documents evaluated."""
    metric: str
    filter: str
    """Name of the filter applied to the answers before scoring, or "none"."""
    value: float
    standard_error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessReport:
    """Scores from lm-evaluation-harness."""

    lm_eval: str
    """Version of the harness."""
    limit: int | None
    """Maximum number of documents of each task; scores with a limit are only for trying things out."""
    scores: list[HarnessScore]
