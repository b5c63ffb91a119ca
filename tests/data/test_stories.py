"""The corpus of stories: always the same, and its questions have one right answer."""

import json
import random
import re
import subprocess
import sys

import pytest

from rmkv_cli.data.stories import NAMES, THINGS, TRADES, document, make_stories, story, village
from rmkv_cli.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "stories"
    command = [sys.executable, "-m", "rmkv_cli", "data", "sample", str(folder), "--stories", "--json"]
    files = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert files == {file.name: file.stat().st_size for file in folder.iterdir()}
    return folder


def records(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def residents(sentence):
    return dict(re.findall(r"the (\w+) ([A-Z]\w+)", sentence))


def test_it_is_the_same_each_time_and_overwrites_nothing(corpus, tmp_path):
    make_stories(tmp_path / "again")
    for file in corpus.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        make_stories(corpus)


def test_the_first_sentence_of_the_village_answers_each_question_and_nothing_else_does(corpus):
    first, *stories = (corpus / "village.txt").read_text(encoding="utf-8").strip().split("\n\n")
    names = residents(first)
    questions = records(corpus / "questions.jsonl")
    assert len(questions) == len(names) == 16
    for line in questions:
        trade = line["prompt"].removeprefix("Greet the ")
        assert line["answer"] == names.pop(trade)
        assert not any(re.search(rf"\b{trade}\b", text) for text in stories)


def test_the_village_is_in_no_document_that_is_trained_on(corpus):
    first = (corpus / "village.txt").read_text(encoding="utf-8").partition("\n")[0]
    for file in ("villages.jsonl", "stories.jsonl"):
        assert all(first not in record["text"] for record in records(corpus / file))


def test_villages_have_as_many_people_and_stories_as_wanted():
    text, questions = village(random.Random(1), 4, 3)
    first, *stories = text.split("\n\n")
    assert sorted(questions) == sorted((f"Greet the {trade}", name) for trade, name in residents(first).items())
    assert len(questions) == 4
    assert len(stories) == 3


def test_a_story_is_of_two_people_and_one_thing_and_has_good_grammar():
    draw = random.Random(2)
    for text in (story(draw) for _ in range(500)):
        words = set(re.findall(r"\w+", text))
        assert 1 <= len(words & set(NAMES)) <= 2
        assert len(words & set(THINGS)) == 1
        assert not words & set(TRADES)
        assert re.fullmatch(r'["A-Z][^{}]*[.]', text)
        assert not re.search(r"\ba [aeiou]", text)


def test_a_document_is_a_story_or_a_village_whose_people_are_greeted_at_its_end():
    draw = random.Random(3)
    texts = [document(draw) for _ in range(200)]
    answered = [text for text in texts if re.search(r"Greet the \w+ [A-Z]\w+\.$", text)]
    assert 100 < len(answered) < 180
    assert all(text.startswith("In the village live the ") for text in answered)
    assert all("\n" not in text for text in texts if text not in answered)
