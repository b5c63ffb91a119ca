"""Countdown: reach a target with given numbers."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rmkv_cli.data.exercises.exercise import Puzzle
from rmkv_cli.data.synthetic.equations import SIGNS, evaluate

CALCULATION = re.compile(r"(?<![-+*/()=\s\d])[-+*/()=\s]*\d[-+*/()=\s\d]*")
"""The longest run of what calculations consist of."""
ATTACHED = re.compile(r"[^\W\d][(\d]|[\d)][^\W\d]|\.\d")
"""Characters of a calculation that belong to a name, a call or a decimal number."""
LONGEST = 200
"""Most characters of a calculation."""


def countdown(numbers: int, rng: np.random.Generator) -> Puzzle:
    """Return a target to reach with `numbers` numbers from 1 to 25.

    An answer is right if it contains one calculation, alone or followed by "= target", that reaches the target with
    + - * / and uses each given number at most once: "3 * 7 + 25 = 46".
    """
    while True:
        given = rng.integers(1, 26, numbers).tolist()
        calculation, value = str(given[0]), given[0]
        for number in given[1:]:
            choices = [(value + number, "+"), (value * number, "*")]
            choices += [(value - number, "-")] * (value > number) + [(value // number, "/")] * (value % number == 0)
            value, sign = choices[rng.integers(len(choices))]
            calculation = f"({calculation}) {sign} {number}" if " " in calculation else f"{calculation} {sign} {number}"
        if value < 1000 and value not in given:
            break
    shown = ", ".join(map(str, rng.permutation(given)))
    question = (
        f"Make {value} from the numbers {shown}. Use + - * / and parentheses, and each number at most once. "
        "Answer with the calculation."
    )
    return Puzzle(question, calculation, lambda answer: float(reaches(answer, value, given)))


def reaches(answer: str, target: int, given: Sequence[int]) -> bool:
    """Return whether an answer contains exactly one calculation and that one reaches the target with given numbers."""
    found = CALCULATION.findall(answer.translate(SIGNS))
    if len(found) != 1 or len(found[0]) > LONGEST or ATTACHED.search(answer):
        return False
    calculation, equals, result = found[0].partition("=")
    used = Counter(re.findall(r"\d+", calculation))
    if (equals and result.strip() != str(target)) or not used <= Counter(map(str, given)):
        return False
    try:
        return evaluate(calculation) == target
    except (ValueError, ZeroDivisionError):
        return False
