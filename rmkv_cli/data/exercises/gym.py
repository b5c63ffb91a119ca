"""Exercises of the package reasoning-gym."""

import json
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from rmkv_cli.config import ReasoningGymExercises
from rmkv_cli.data.exercises.exercise import Puzzle
from rmkv_cli.errors import UserError, did_you_mean

RUNS_CODE = {"eval", "exec", "parse_expr", "sympify"}
"""Functions that run a text as Python code; sympy's do too."""


def reasoning_gym(task: ReasoningGymExercises, rng: np.random.Generator) -> Puzzle:
    """Return an entry of a data set; an answer is right if the data set's scorer gives it full marks.

    Raises:
        UserError: the package is missing, does not know the data set or its options, or would run answers as code.
    """
    dataset = _dataset(task.dataset, json.dumps(task.options))
    entry = dataset[int(rng.integers(1 << 31))]

    def score(answer: str) -> float:
        return float(dataset.score_answer(answer.strip(), entry) >= 1)

    return Puzzle(entry["question"], str(entry["answer"]), score)


@lru_cache
def _dataset(name: str, options: str) -> Any:
    if not find_spec("reasoning_gym"):
        raise UserError("exercises of kind 'reasoning_gym' need a package: pip install reasoning-gym")
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no data set '{name}'{did_you_mean(name, DATASETS)}")
    if RUNS_CODE & set(DATASETS[name][0].score_answer.__code__.co_names):
        raise UserError(f"reasoning-gym's '{name}' would run a model's answers as code; choose another data set")
    try:
        return create_dataset(name, seed=0, size=1 << 31, **json.loads(options))
    except (TypeError, ValueError, AssertionError) as error:  # what its checks of options raise
        raise UserError(f"reasoning-gym's data set '{name}': {error}") from None
