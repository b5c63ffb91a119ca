"""An exercise, and the part of a generated text that is its answer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NUMBER = re.compile(r"(?:(?<![\d)])[-−])?\d+(?:,\d{3})*(?:\.\d+)?")
"""A number with its sign. The minus in 7-5 is an operator, not a sign."""


@dataclass(frozen=True)
class Exercise:
    """A prompt and the scorer of its answers."""

    prompt: list[int]
    """Ids of the whole prompt, including the token that begins the document."""
    question: str
    """The prompt as a person reads it."""
    answer: list[int]
    """Ids of a right answer, without the token that ends it."""
    length: int | None
    """Exact number of tokens of an answer; None: the answer ends with one of the model's end tokens."""
    score: Callable[[Sequence[int], str], float]
    """Scorer of answers: returns 1 for a right answer and 0 for any other.

    Its arguments are the answer's ids and its text, both without the token that ends it. Exercises in words are scored
    by the text, memory tasks by the ids.
    """


class Puzzle(NamedTuple):
    """An exercise in words, before it becomes the prompt of a model."""

    question: str
    answer: str
    """A right answer."""
    score: Callable[[str], float]
    """Scorer of answers, each without its thought: returns 1 or 0."""


def only(pattern: re.Pattern[str], *accepted: Sequence[str]) -> Callable[[str], float]:
    """Return a scorer that compares all matches of `pattern` in an answer, in order, with the accepted lists.

    An answer with several candidates is wrong, even if all of them are right.
    """
    right = [list(found) for found in accepted]
    return lambda answer: float(pattern.findall(answer) in right)


def final_answer(text: str, opened: str, closed: str) -> str:
    """Return what follows the last thought in a generated text, or "" if a thought is not closed.

    Args:
        text: the generated text; where the prompt opened a thought, with `opened` before it.
        opened: the spelling of the token that opens a thought.
        closed: the spelling of the token that closes it.
    """
    after = text.rpartition(closed)[2]
    return "" if opened in after else after
