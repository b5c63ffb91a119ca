"""Exercises: a prompt, its answer and its scorer depend only on the task's level and the random generator."""

import sys
import tomllib
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from rmkv_cli.config import Exercises, Section, dump_toml, parse
from rmkv_cli.data.chat import pieces_of
from rmkv_cli.data.exercises import levels, make_exercise
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import train_tokenizer

MEMORY = "recall", "copy", "reverse", "needle", "facts"
KINDS = "arithmetic", "countdown", "spelling", "sorting", *MEMORY


class Rollouts(Section):
    """A section that has exercises, as a config does."""

    tasks: list[Exercises]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(["The grass is green. One of the special magic numbers is: 12."] * 2), 400)


@pytest.fixture(scope="module")
def make(tokenizer):
    """Makes an exercise of a task's level from a seed."""
    return lambda task, level, seed: make_exercise(task, level, tokenizer, np.random.default_rng(seed))


def task_of(kind: str, **keys: Any) -> Any:
    return TypeAdapter(Exercises).validate_python({"kind": kind} | keys)


def content(exercise):
    return exercise.prompt, exercise.question, exercise.answer, exercise.length


class TestLevels:
    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("arithmetic", ["arithmetic digits=1", "arithmetic digits=2", "arithmetic digits=3"]),
            ("countdown", ["countdown numbers=3", "countdown numbers=4"]),
            ("spelling", ["spelling letters=4", "spelling letters=6", "spelling letters=8"]),
            ("sorting", ["sorting items=3", "sorting items=5"]),
        ],
    )
    def test_exercises_in_words_have_one_for_each_entry_of_their_list(self, kind, names):
        assert levels(task_of(kind)) == names

    def test_memory_tasks_have_one_for_each_combination_of_their_lists(self):
        named = levels(task_of("needle", name="keys", depth=[0, 0.25], segments=[0, 9]))
        assert named == [f"keys depth={depth} segments={n}" for depth in (0.0, 0.25) for n in (0, 9)]

    def test_a_data_set_of_reasoning_gym_is_one(self):
        assert levels(task_of("reasoning_gym", dataset="ab")) == ["reasoning_gym ab"]


class TestExercise:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_depends_only_on_its_level_and_its_seed(self, kind, make):
        task = task_of(kind)
        level = levels(task)[-1]
        axis = level.split()[1].partition("=")[0]
        value = getattr(task, axis)[-1]
        alone = task.model_copy(update={axis: [value, value], "weight": 7.0})
        for seed in range(5):
            assert content(make(task, level, seed)) == content(make(alone, level, seed))

    @pytest.mark.parametrize("kind", KINDS)
    def test_seeds_give_different_ones(self, kind, make):
        for level in levels(task := task_of(kind, **({"segments": [1]} if kind in MEMORY else {}))):
            made = [make(task, level, seed) for seed in range(20)]
            assert len({tuple(exercise.prompt) for exercise in made}) > 15, level
            assert len({tuple(exercise.answer) for exercise in made}) > 3, level

    @pytest.mark.parametrize("kind", KINDS)
    def test_its_own_answer_is_right(self, kind, make, tokenizer):
        for level in levels(task := task_of(kind, **({"segments": [0, 2]} if kind in MEMORY else {}))):
            for seed in range(20):
                exercise = make(task, level, seed)
                assert exercise.score(exercise.answer, tokenizer.decode(exercise.answer)) == 1

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MEMORY])
    def test_in_words_it_is_a_conversation_whose_answer_ends_by_itself(self, kind, make, tokenizer):
        exercise = make(task := task_of(kind), levels(task)[0], 0)
        assert exercise.prompt == tokenizer.encode_document(pieces_of([("user", exercise.question)], tokenizer))
        assert exercise.length is None

    def test_the_levels_are_what_they_say(self, make, tokenizer):
        for digits in (1, 4):
            question = make(task_of("arithmetic", digits=[digits]), f"arithmetic digits={digits}", 0).question
            assert [len(word) for word in question.rstrip("?.").split() if word.isdigit()] == [digits] * 2
        word = tokenizer.decode(make(task_of("spelling", letters=[9]), "spelling letters=9", 0).answer)
        assert len(word.split("-")) == 9
        numbers = tokenizer.decode(make(task_of("sorting", items=[7]), "sorting items=7", 0).answer)
        assert len(set(numbers.split(", "))) == 7

    @pytest.mark.parametrize("kind", MEMORY)
    @pytest.mark.parametrize("segments", [0, 5])
    def test_the_prompt_of_a_memory_task_ends_before_the_answer(self, kind, segments, make, tokenizer):
        task = task_of(kind, segments=[segments], segment_length=32)
        exercise = make(task, levels(task)[0], 1)
        assert exercise.prompt[0] == tokenizer.opening
        assert exercise.length == len(exercise.answer)
        assert len(exercise.prompt) > segments * 32
        question = exercise.question
        match kind:
            case "recall":
                asked = exercise.prompt[-1]
                assert exercise.prompt[exercise.prompt.index(asked) + 1 :][:1] == exercise.answer
            case "copy":
                assert exercise.prompt[1:33] == exercise.answer
            case "reverse":
                assert exercise.prompt[32:0:-1] == exercise.answer
            case "needle":
                number = tokenizer.decode(exercise.answer)
                assert f"is:{number}." in question
                assert question.endswith(" is:")
            case "facts":
                assert question.endswith("?")
                assert tokenizer.decode(exercise.answer) in question

    def test_facts_ask_at_the_end_of_the_story_even_if_training_asks_on_the_way(self, make):
        task = task_of("facts", along=True, segments=[1])
        plain = task_of("facts", segments=[1])
        for seed in range(5):
            exercise = make(task, levels(task)[0], seed)
            assert content(exercise) == content(make(plain, levels(plain)[0], seed))
            assert exercise.question.count("?") == 1


class TestConfig:
    def test_it_survives_a_file(self):
        tasks = Rollouts(tasks=[{"kind": kind, "weight": 2} for kind in KINDS])
        assert parse(Rollouts, tomllib.loads(dump_toml(tasks)), "x.toml") == tasks

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"kind": "needle", "text": "book"}, "text = 'book' names a source of a mix, and exercises have no mix"),
            ({"kind": "aritmetic"}, "kind should be 'arithmetic', .*, or 'facts', got 'aritmetic'; did you mean 'ari"),
            ({"digits": [1]}, "kind is missing; it should be 'arithmetic', 'countdown', .*, or 'facts'$"),
            ({"kind": "sorting", "item": [3]}, r"x.toml: tasks\[0\].item: unknown key; did you mean 'items'"),
            ({"kind": "arithmetic", "digits": [0]}, r"tasks\[0\].digits\[0\]: should be greater than or equal to 1"),
            ({"kind": "countdown", "weight": 0}, r"tasks\[0\].weight: should be greater than 0"),
            ({"kind": "reasoning_gym"}, r"tasks\[0\].dataset: is missing"),
        ],
    )
    def test_mistakes_are_one_line(self, table, message):
        with pytest.raises(UserError, match=message) as caught:
            parse(Rollouts, {"tasks": [table]}, "x.toml")
        assert "\n" not in str(caught.value)

    def test_a_vocabulary_may_be_too_small_for_a_memory_task(self, make):
        with pytest.raises(UserError, match=r"task 'recall': .* the tokenizer has \d+; lower keys, values or noise"):
            make(task := task_of("recall", keys=500), levels(task)[0], 0)


class TestReasoningGym:
    def test_without_the_package_the_message_says_how_to_install_it(self, make, monkeypatch):
        monkeypatch.setitem(sys.modules, "reasoning_gym", None)
        with pytest.raises(UserError, match=r"need a package: pip install reasoning-gym$"):
            make(task := task_of("reasoning_gym", dataset="spell_backward"), levels(task)[0], 0)

    @pytest.mark.parametrize("dataset", ["spell_backward", "game_of_life_halting", "survo", "knights_knaves"])
    def test_only_the_right_answer_without_hedging_gets_full_marks(self, make, tokenizer, dataset):
        pytest.importorskip("reasoning_gym")
        task = task_of("reasoning_gym", dataset=dataset)
        for seed in range(5):
            exercise = make(task, levels(task)[0], seed)
            assert content(exercise) == content(make(task, levels(task)[0], seed))
            right = tokenizer.decode(exercise.answer)
            assert exercise.score([], f"<think>Hm.</think>\n{right}\n") == 1
            for text in ("", exercise.question, f"{right} or x", f"{right}\n{right}", f"<think>{right}</think>"):
                assert exercise.score([], text) == 0

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"dataset": "spell_backwards"}, "no data set 'spell_backwards'; did you mean 'spell_backward'"),
            ({"dataset": "n_queens"}, "'n_queens' would run a model's answers as code; choose another"),
            ({"dataset": "spell_backward", "options": {"hue": 3}}, "'spell_backward': .*'hue'"),
            ({"dataset": "spell_backward", "options": {"min_word_len": 0}}, "'spell_backward': min_word_len"),
        ],
    )
    def test_mistakes_are_one_line(self, make, keys, message):
        pytest.importorskip("reasoning_gym")
        with pytest.raises(UserError, match=message):
            make(task := task_of("reasoning_gym", **keys), levels(task)[0], 0)
