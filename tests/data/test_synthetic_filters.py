"""The filters of synthetic data: what each rejects and what it accepts."""

import json

import pytest

from rmkv_cli.config import Filters
from rmkv_cli.data.synthetic import REFUSED, Answer
from rmkv_cli.data.synthetic.equations import wrong_equation
from rmkv_cli.data.synthetic.filters import Evaluation, Rejected, Repetition, parts, verify

STORY = "Once there was a small fox who lived at the edge of a deep forest and counted the stars each night."


def rejected_by(call, *arguments):
    with pytest.raises(Rejected) as caught:
        call(*arguments)
    return caught.value.filter_name


@pytest.mark.parametrize(
    ("filters", "text", "reason", "name"),
    [
        ({}, "said", REFUSED, "refused"),
        ({}, "sai", "length", "truncated"),
        ({}, " \n", "stop", "min_characters"),
        ({"min_characters": 5}, "four", "stop", "min_characters"),
        ({"max_characters": 5}, "sixsix", "stop", "max_characters"),
        ({"json_keys": ["a"]}, "a", "stop", "json_keys"),
        ({"json_keys": ["a"]}, "[1]", "stop", "json_keys"),
        ({"json_keys": ["a", "b"]}, '{"a": "x"}', "stop", "json_keys"),
        ({"json_keys": ["a"]}, '{"a": 5}', "stop", "json_keys"),
        ({"json_keys": ["a"]}, '{"a": " "}', "stop", "json_keys"),
        ({"json_keys": ["a"]}, "[" * 100_000, "stop", "json_keys"),
    ],
)
def test_an_answer_of_another_shape_is_rejected(filters, text, reason, name):
    assert rejected_by(parts, Filters(**filters), Answer(text, reason)) == name


@pytest.mark.parametrize(
    "text", ['{"a": " x ", "more": 1}', '```json\n{"a": "x"}\n```', 'Here it is:\n```\n{"a": "x"}\n```\nDone.']
)
def test_the_texts_of_a_json_object_are_found(text):
    assert parts(Filters(json_keys=["a"]), Answer(text, "stop"))["a"] == "x"


def test_truncated_answers_can_be_kept():
    assert parts(Filters(truncated=False), Answer("cut", "length")) == {"response": "cut"}


def test_a_lone_surrogate_is_replaced():
    found = parts(Filters(json_keys=["a"]), Answer('{"a": "x\\ud800"}', "stop"))
    assert json.dumps(found, ensure_ascii=False).encode()
    assert found["a"] == "x?"


@pytest.mark.parametrize(
    "text",
    [
        "12 + 5 * 3 = 27.",
        "1,000 - 1 = 999, and then 999 / 3 = 333",
        "7 / 3 = 2.33",
        "(2 + 3) × 4 = 20 apples",
        "5 - -3 = 8",
        "2 * 3 = 6 = 6",
        "3 * 4 = 12\n12 + 1 = 13",
        "First 3 * 4 = 12 + 1 = 13",
    ],
)
def test_right_equations_are_accepted(text):
    assert wrong_equation(text) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no equation"),
        ("The answer is 27.", "has no equation"),
        ("x = 27", "has no equation"),
        ("3 * 4 = 12, so 12 + 1 = 14", "12 + 1 = 14 is wrong"),
        ("3 * 4 = 12 + 1 = 14", "12 + 1 = 14 is wrong"),
        ("7 / 3 = 2", "7 / 3 = 2 is wrong"),
        ("7 / 3 = 2.34", "7 / 3 = 2.34 is wrong"),
        ("3 / 0 = 3", "3 / 0 = 3 cannot be computed"),
        ("((3 + 1) = 4", "((3 + 1) = 4 cannot be computed"),
        ("9 ** 9 ** 9 ** 9 = 9", "has no equation"),
    ],
)
def test_wrong_equations_are_rejected(text, why):
    assert wrong_equation(text) == why


def test_a_quoted_answer_occurs_word_for_word_in_the_slot():
    filters = Filters(json_keys=["answer"], quoted={"answer": "passage"})

    def said(answer):
        return {"response": "", "answer": answer, "passage": "The fox, Rusty, was\nborn in 1987."}

    assert verify(filters, said("Rusty was born")) == "verified"
    assert verify(filters, said("in 1987")) == "verified"
    for wrong in ("1988", "us", "Rusty born", "...", "1987 in"):
        assert rejected_by(verify, filters, said(wrong)) == "quoted"


def test_rows_that_share_words_with_an_evaluation_set_are_rejected(tmp_path):
    question = "What did the small fox who lived at the edge of a deep forest count each night?"
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": question, "choices": ["stars", "Paris"]}) + "\n")
    (tmp_path / "short.txt").write_text("How many legs have spiders?")
    filters = Filters(evaluation=["set.jsonl", "short.txt"])
    evaluation = Evaluation(filters, tmp_path)
    assert rejected_by(evaluation.require_absent, STORY + " " + question.upper()) == "evaluation"
    assert rejected_by(evaluation.require_absent, "So: how many legs have  spiders") == "evaluation"
    evaluation.require_absent("Stars over Paris; how many legs have horses?")
    words = ["small", "fox", "who", "lived", "at", "the", "edge", "of", "a", "deep", "forest", "count", "each", "night"]
    assert rejected_by(evaluation.require_absent, " ".join(words[:13])) == "evaluation"
    evaluation.require_absent(" ".join(words[:12]))
    looser = Evaluation(filters.model_copy(update={"ngram": 8}), tmp_path)
    assert rejected_by(looser.require_absent, " ".join(words[:8])) == "evaluation"


def test_exact_and_near_duplicates_are_rejected():
    repetition = Repetition(Filters())
    repetition.add(STORY, STORY)
    assert rejected_by(repetition.add, STORY.upper() + "!", STORY) == "duplicates"
    longer = STORY + " " + " ".join(f"word{i}" for i in range(60))
    repetition.add(longer, longer)
    nearly = longer.replace("word59", "other")
    assert rejected_by(repetition.add, nearly, nearly) == "near_duplicates"
    repetition.add("42 is one answer", "42")
    repetition.add("42 is another answer", "42")  # too short to be compared


def test_near_duplicates_can_be_kept():
    repetition = Repetition(Filters(near_duplicates=0))
    repetition.add("one " + STORY, STORY)
    repetition.add("two " + STORY, STORY)
