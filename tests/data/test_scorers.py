"""Scorers of exercises cannot be fooled: only the right answer earns the reward."""

import re
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rmkv_cli.config import Exercises
from rmkv_cli.data.exercises import levels, make_exercise
from rmkv_cli.data.exercises.countdown import reaches
from rmkv_cli.data.exercises.exercise import final_answer
from rmkv_cli.data.exercises.words import arithmetic
from rmkv_cli.tokenizer import Tokenizer, train_tokenizer

WORDS = "arithmetic", "countdown", "spelling", "sorting"
MEMORY = "recall", "copy", "reverse", "needle", "facts"
SEEDS = range(5)
TOKENIZER = train_tokenizer(iter(["The grass is green. Make 12 from 3 and 4; spell m-i-k-o."] * 2), 400)


@cache
def exercises(kind, seed, tokenizer=TOKENIZER):
    """Return an exercise of each level of a kind."""
    table = {"kind": kind} | ({"segments": [0, 3], "segment_length": 16} if kind in MEMORY else {})
    task = TypeAdapter(Exercises).validate_python(table)
    return [make_exercise(task, level, tokenizer, np.random.default_rng(seed)) for level in levels(task)]


def wrong_answer(kind, exercise, number):
    """Return the answer of another exercise of the same level."""
    others = (exercises(kind, seed)[number].answer for seed in range(100, 200))
    return next(ids for ids in others if not exercise.score(ids, TOKENIZER.decode(ids)))


HEDGES = {
    "nothing": "",
    "spaces": " \n\t ",
    "the question": "{question}",
    "the question twice": "{question}\n{question}",
    "the answer 100 times in a line": "{hundred}",
    "the answer on 100 lines": "{lines}",
    "the answer in the thought only": "<think>{right}</think>",
    "a thought without an end": "<think>{right}",
    "the answer before a thought without an end": "{right}<think>",
    "the answer before the end of the thought": "{right}</think>",
    "the answer in the first of two thoughts": "<think>{right}</think><think>So it is {right}</think>",
    "a wrong answer after the thought": "<think>{right}</think>{wrong}",
    "a wrong answer": "{wrong}",
    "alternatives": "{right} or {wrong}",
    "alternatives, the right one last": "{wrong} or {right}",
    "a list": "{wrong}, {right}, {wrong}",
    "a wrong answer on the next line": "{right}\n{wrong}",
    "a wrong answer on the line before": "{wrong}\n{right}",
    "a flood of digits": "9" * 10**5,
    "a flood of letters": "a" * 10**5,
    "a flood of hyphens": "-" * 10**5,
    "a sentence that takes it back": "The answer is {right}. No, it is {wrong}.",
}


@pytest.mark.parametrize("hedge", HEDGES)
@pytest.mark.parametrize("kind", WORDS)
def test_hedged_answers_score_zero(kind, hedge):
    for seed in SEEDS:
        for number, exercise in enumerate(exercises(kind, seed)):
            right, wrong = TOKENIZER.decode(exercise.answer), TOKENIZER.decode(wrong_answer(kind, exercise, number))
            fill = {"right": right, "wrong": wrong, "question": exercise.question}
            text = HEDGES[hedge].format(hundred=" ".join([right] * 100), lines="\n".join([right] * 100), **fill)
            assert exercise.score([], text) == 0, (exercise.question, text)


@pytest.mark.parametrize("form", ["{}", " {} ", "{}\n", "<think>Is it 7, or a-b?</think>{}", "<think></think>\n\n{}"])
@pytest.mark.parametrize("kind", WORDS)
def test_the_right_answer_scores_one_whatever_the_thought(kind, form):
    for seed in SEEDS:
        for exercise in exercises(kind, seed):
            text = form.format(TOKENIZER.decode(exercise.answer))
            assert exercise.score([], text) == 1, (exercise.question, text)


@pytest.mark.parametrize("kind", MEMORY)
def test_a_memory_task_accepts_the_right_tokens_and_no_others(kind):
    for seed in SEEDS:
        for number, exercise in enumerate(exercises(kind, seed)):
            right, wrong = exercise.answer, wrong_answer(kind, exercise, number)
            text = TOKENIZER.decode(right)
            assert exercise.score(right, text) == exercise.score(tuple(right), "") == 1
            assert exercise.length == len(right)
            hedges = ([], wrong, right * 100, right + wrong, wrong + right, right[:-1], right[1:], exercise.prompt)
            for ids in (*hedges, TOKENIZER.encode(f"<think>{text}</think>")):
                assert exercise.score(ids, text) == 0


@pytest.mark.parametrize("text", ["12", "12.", "The answer is 12.", "7 + 5 = 12", "7+5=12", "7 plus 5 is 12", "**12**"])
def test_sums_may_be_stated_in_several_ways(text):
    assert _sum_of(7, 5).score(text) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("-12", "7 + 5 = -12", "12.5", "1.2", "12,000", "120", "0", "7 + 5", "7, 5", "7 5", "1 2", "12 12"),
        *("12 or 13", "13\n12", "12 = 13", "13 = 12", "7 + 5 = 13 = 12", "5 + 6 + 1 = 12", "1" * 10**6, "12" * 10**6),
        *("twelve", "١٢", "0x12", "12e0", "10^12", "6 * 2", "{12, 13}", "7 + 5 = 12, or 13", "[7, 5, 12, 13]"),
    ],
)
def test_a_sum_with_other_numbers_is_wrong(text):
    assert _sum_of(7, 5).score(text) == 0


@given(st.integers(1, 9), st.integers(0, 2**32), st.integers() | st.integers(-20, 200))
def test_no_number_but_the_result_is_right(digits, seed, guess):
    puzzle = arithmetic(digits, np.random.default_rng(seed))
    assert puzzle.score(puzzle.answer) == 1
    for form in ("{}", "The answer is {}.", "It is {:,}"):
        assert puzzle.score(form.format(guess)) == (guess == int(puzzle.answer))


@pytest.mark.parametrize(
    "text",
    [
        *("3 * 7 + 25", "(3*7)+25", "25 + 7 × 3", "3 * 7 + 25 = 46", "The answer is (3 * 7) + 25 = 46.", "`3*7+25`"),
        *("25 - -(7 * 3)", "Calculation: 25+3*7", "It is\n3 * 7 + 25\n= 46"),
    ],
)
def test_any_calculation_that_reaches_the_target_is_right(text):
    assert reaches(text, 46, [3, 7, 25, 2])


@pytest.mark.parametrize(
    "text",
    [
        *("46", "46 = 46", "= 46", "46 = 3 * 7 + 25", "46 + 3 - 3", "(46)", "3 * 7 + 25 =", "3 * 7 + 25 = 47"),
        *("3 * 7 + 25 = 46 = 46", "3 * 7 + 25 = 40 = 46", "23 + 23", "3 * 7 + 25 + 2 - 2", "25 + 25 - 2 - 2"),
        *("5 ** 2", "7 ** 2 - 3", "25 + 3 * 7 ** (2 - 1 ** 0)", "9 ** 9 ** 9 ** 9", "25 // 1 + 21", "3 + 7 % 25"),
        *("x", "target", "3 * 7 + 25 + x", "x * 46", "int(3 * 7 + 25)", "3 * 7 + 25j", "3.0 * 7 + 25", ".3 * 7 + 25"),
        *("3 / 0", "3 / (7 - 7)", "25 / (3 - 3)", "__import__('os')", "3 if 7 else 25", "3 * 7, 25", "(3 * 7 + 25"),
        *("3 * 7 + 2,5", "3 * 7 + 25,000", "3 * 7 + 25, -1"),
        *("()", "1e9", "0x2e", "03 * 7 + 25", "3" * 10**6, "-" * 199 + "3", "(" * 90 + "46" + ")" * 90),
        *("(" * 10**5 + "46" + ")" * 10**5, "3 * 7 + 25" + " + 0" * 10**5, "+".join(["1"] * 46)),
        *("3 * 7 + 25 or 7 * 7 - 3", "3 * 7 + 25 and 3 * 7 + 25", "3 * 7 + 25\n3 * 7 + 25", "3 7 25", "3, 7 and 25"),
    ],
)
def test_a_calculation_that_breaks_the_rules_is_wrong(text):
    assert not reaches(text, 46, [3, 7, 25, 2])


def test_a_number_that_is_given_twice_may_be_used_twice():
    assert reaches("5 * 5", 25, [5, 5, 3])
    assert not reaches("5 * 5", 25, [5, 3])


@given(st.text("0123456789+-*/()= .\n", max_size=30))
@example("((((7")
def test_any_text_gets_a_score(text):
    assert reaches(text, 46, [3, 7, 25]) in (True, False)


def test_a_spelling_has_every_letter_in_its_place():
    (exercise, *_) = exercises("spelling", 0)
    right = TOKENIZER.decode(exercise.answer)
    wrong = right[::-1], right[:-2], right.replace("-", ""), right.upper(), f"x{right}", f"{right}-x", f"-{right}"
    assert [exercise.score([], text) for text in wrong] == [0] * len(wrong)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *[("12", "12"), ("<t>1</t>2", "2"), ("<t>1</t>", ""), ("<t>1", ""), ("1</t>2", "2")],
        *[("<t>1</t>2<t>3</t>4", "4"), ("<t>1</t>2<t>3", ""), ("<t>1</t>2<t>", "")],
    ],
)
def test_the_answer_follows_the_last_thought(text, answer):
    assert final_answer(text, "<t>", "</t>") == answer


def test_a_thought_that_the_chat_template_opens_is_not_an_answer():
    template = "{% for m in messages %}<start>{{ m.content }}<end>{% endfor %}<think>"
    opening = Tokenizer.from_files({"tokenizer.json": TOKENIZER.to_json(), "chat_template.jinja": template})
    for exercise in exercises("arithmetic", 0, opening):
        assert opening.decode(exercise.prompt).endswith("<think>")
        right = opening.decode(exercise.answer)
        assert exercise.score([], right) == 0
        assert exercise.score([], f"Let me see.</think>{right}") == 1


def _sum_of(a, b):
    """Return an exercise that asks for a sum."""
    digits = len(str(a))
    puzzles = (arithmetic(digits, np.random.default_rng(seed)) for seed in range(10_000))
    return next(p for p in puzzles if re.search(rf"\b{a} (\+|plus) {b}\b", p.question))
