"""Generate exercises of any kind from a task, a level and a random generator."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmkv_cli.config import (
    ArithmeticExercises,
    CountdownExercises,
    Exercises,
    ReasoningGymExercises,
    SortingExercises,
    SpellingExercises,
    TaskSource,
)
from rmkv_cli.data.chat import pieces_of
from rmkv_cli.data.exercises.countdown import countdown
from rmkv_cli.data.exercises.exercise import Exercise, Puzzle, final_answer
from rmkv_cli.data.exercises.gym import reasoning_gym
from rmkv_cli.data.exercises.memory import memory
from rmkv_cli.data.exercises.words import arithmetic, sorting, spelling
from rmkv_cli.data.tasks import row_axis
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Special, Tokenizer

WORDS: dict[type, tuple[str, Callable[[int, np.random.Generator], Puzzle]]] = {
    ArithmeticExercises: ("digits", arithmetic),
    CountdownExercises: ("numbers", countdown),
    SpellingExercises: ("letters", spelling),
    SortingExercises: ("items", sorting),
}
"""For each kind in words, the config key of its levels and the function that makes an exercise of a level."""


def levels(task: Exercises) -> list[str]:
    """Return the names of a task's levels, such as "arithmetic digits=2" or "recall pairs=4 segments=7".

    A memory task has one level for each combination of its two lists.
    """
    return list(_settings(task))


def make_exercise(task: Exercises, level: str, tokenizer: Tokenizer, rng: np.random.Generator) -> Exercise:
    """Return an exercise, which depends only on the arguments.

    Args:
        task: kind and settings of the exercise.
        level: one of the task's `levels`.
        tokenizer: the model's tokenizer, which also determines the format of conversations.
        rng: draws the exercise.

    Raises:
        UserError: the model takes no conversations, its vocabulary is too small for a memory task, or reasoning-gym
            cannot be used.
    """
    settings = _settings(task)[level]
    if isinstance(task, TaskSource):
        return memory(task, tokenizer, rng, *settings)
    if isinstance(task, ReasoningGymExercises):
        return _as_message(reasoning_gym(task, rng), tokenizer)
    _, make = WORDS[type(task)]
    return _as_message(make(settings[0], rng), tokenizer)


def _settings(task: Any) -> dict[str, tuple[Any, ...]]:
    """Return the settings of each level by the level's name."""
    if isinstance(task, TaskSource):
        axis, rows = row_axis(task)
        return {f"{task.name} {axis}={row} segments={n}": (row, n) for row in rows for n in task.segments}
    if isinstance(task, ReasoningGymExercises):
        return {f"{task.kind} {task.dataset}": ()}
    axis = WORDS[type(task)][0]
    return {f"{task.kind} {axis}={value}": (value,) for value in getattr(task, axis)}


def _as_message(puzzle: Puzzle, tokenizer: Tokenizer) -> Exercise:
    """Return a puzzle as the exercise of a conversation's first message."""
    try:
        pieces = pieces_of([("user", puzzle.question)], tokenizer)
    except ValueError as error:
        raise UserError(f"exercises in words are chat messages: {error}") from None
    prompt, whole = tokenizer.encode_documents([pieces, [*pieces, puzzle.answer]])
    opened, closed = tokenizer.roles.thinking or (Special.THINK, Special.END_THINK)
    shown = "".join(pieces)
    before = opened if shown.rfind(opened) > shown.rfind(closed) else ""  # some chat templates open a thought

    def score(ids: Sequence[int], text: str) -> float:
        return puzzle.score(final_answer(before + text, opened, closed))

    return Exercise(prompt, puzzle.question, whole[len(prompt) :], None, score)
