"""Exercises of the package reasoning-gym."""

from importlib.util import find_spec

import numpy as np

from rmkv_cli.config import ReasoningGymExercises
from rmkv_cli.data.exercises.exercise import Puzzle
from rmkv_cli.errors import UserError, did_you_mean

RUNS_CODE = {"eval", "exec", "parse_expr", "sympify"}
"""Functions that run a text as Python code; sympy's parsers do too."""


def reasoning_gym(task: ReasoningGymExercises, rng: np.random.Generator) -> Puzzle:
    """Return an entry of a data set; an answer is right if the data set's scorer gives it full marks.

    Some scorers give full marks to a copy of the question, to a repeated answer or to one with alternatives. Where a
    scorer does so for this entry, only the answer that the data set gives is right.

    Raises:
        UserError: the package is missing, does not know the data set or its options, or would run answers as code.
    """
    if not find_spec("reasoning_gym"):
        raise UserError("exercises of kind 'reasoning_gym' need a package: pip install reasoning-gym")
    from reasoning_gym.factory import DATASETS, create_dataset

    name = task.dataset
    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no data set '{name}'{did_you_mean(name, DATASETS)}")
    if RUNS_CODE & set(DATASETS[name][0].score_answer.__code__.co_names):
        raise UserError(f"reasoning-gym's '{name}' would run a model's answers as code; choose another data set")
    try:
        dataset = create_dataset(name, seed=int(rng.integers(1 << 31)), size=1, **task.options)
    except (TypeError, ValueError, AssertionError) as error:  # raised by its validation of options
        raise UserError(f"reasoning-gym's data set '{name}': {error}") from None
    entry = dataset[0]
    question, right = entry["question"], str(entry["answer"] or "")

    def full_marks(answer: str) -> bool:
        try:
            return dataset.score_answer(answer, entry) >= 1
        except Exception:  # some scorers let any exception of their parsers escape
            return False

    hedges = "", question, f"{right}\n{right}", f"{right} or x", f"{right} or 0", f"{right}{question}"
    fooled = any(map(full_marks, hedges))

    def score(answer: str) -> float:
        given = answer.strip()
        return float(given == right if fooled else full_marks(given))

    return Puzzle(question, right, score)
