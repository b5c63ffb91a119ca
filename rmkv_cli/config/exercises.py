"""Exercises for reinforcement learning: each has a prompt, a scorer, and one or more levels of difficulty."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rmkv_cli.config.section import Section
from rmkv_cli.config.tasks import CopySource, FactsSource, NeedleSource, RecallSource, ReverseSource, TaskSource


class ExerciseSource(Section):
    """Keys that all worded exercises share. An answer scores 1 or 0; text in <think> before it is ignored."""

    weight: float = Field(1, gt=0, le=1e9)
    """The kind gets weight / (sum of all weights) of the exercises."""


class ArithmeticExercises(ExerciseSource):
    """Add, subtract and multiply two whole numbers: "What is 7 + 5?"."""

    kind: Literal["arithmetic"] = "arithmetic"
    digits: list[Annotated[int, Field(ge=1, le=9)]] = Field([1, 2, 3], min_length=1)
    """Levels: number of digits of each operand."""


class CountdownExercises(ExerciseSource):
    """Reach a target with + - * / and the given numbers, each used at most once."""

    kind: Literal["countdown"] = "countdown"
    numbers: list[Annotated[int, Field(ge=2, le=8)]] = Field([3, 4], min_length=1)
    """Levels: how many numbers are given."""


class SpellingExercises(ExerciseSource):
    """Spell a made-up word letter by letter, forwards or backwards: "m-i-k-o"."""

    kind: Literal["spelling"] = "spelling"
    letters: list[Annotated[int, Field(ge=2, le=64)]] = Field([4, 6, 8], min_length=1)
    """Levels: number of letters."""


class SortingExercises(ExerciseSource):
    """Sort whole numbers from smallest to largest or from largest to smallest."""

    kind: Literal["sorting"] = "sorting"
    items: list[Annotated[int, Field(ge=2, le=64)]] = Field([3, 5], min_length=1)
    """Levels: how many numbers to sort."""


class ReasoningGymExercises(ExerciseSource):
    """A data set of the package reasoning-gym (2025). Only answers with full marks from its own scorer count.

    Data sets whose scorer runs the model's answer as Python code are refused.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str = Field(min_length=1)
    """Name of the data set, such as spell_backward."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the data set, which set the difficulty."""


def _without_text(task: Section) -> Section:
    if isinstance(task, TaskSource) and task.text is not None:
        raise ValueError(f"text = '{task.text}' names a source of a mix, and exercises have no mix; remove the key")
    return task


Exercises = Annotated[
    ArithmeticExercises
    | CountdownExercises
    | SpellingExercises
    | SortingExercises
    | ReasoningGymExercises
    | RecallSource
    | CopySource
    | ReverseSource
    | NeedleSource
    | FactsSource,
    Field(discriminator="kind"),
    AfterValidator(_without_text),
]
"""Exercises of one kind: worded, or a memory task, whose levels are all combinations of its two lists."""
