"""Exercises for reinforcement: prompts, each with a scorer of answers."""

from rmkv_cli.data.exercises.exercise import Exercise
from rmkv_cli.data.exercises.generate import levels, make_exercise

__all__ = ["Exercise", "levels", "make_exercise"]
