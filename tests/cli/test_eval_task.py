import json

import pytest
from small_run import TEXT, error_of, save_small_model

from rmkv_cli.cli.evaluate_task import TASKS
from rmkv_cli.config import MixConfig, RecallSource, parse
from rmkv_cli.data.mix import prepare
from rmkv_cli.evaluation import task_accuracy


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a mix that has a task with text as its noise; the model and tokenizer."""
    place = tmp_path_factory.mktemp("task")
    model, tokenizer = save_small_model(place / "model")
    for i in range(20):
        (place / f"{i}.txt").write_text(f"{i}. {TEXT}" * 5)
    sources = [
        {"kind": "files", "name": "prose", "weight": 1, "files": ["*.txt"]},
        {"kind": "recall", "text": "prose", "keys": 4, "values": 4, "pairs": [1, 2], "segments": [3]},
    ]
    mix = parse(MixConfig, {"validation": 0.3, "tokens": 3000, "sources": sources}, "mix")
    prepare(mix, place, tokenizer, place / "mix", 1)
    return place, model, tokenizer


def test_a_table_and_a_heat_map(place, printed):
    place = place[0]
    small = [
        word for key in ("keys=4", "values=4", "noise=4", "pairs=[1,3]", "segments=[0,7]") for word in ("--set", key)
    ]
    ask = ["eval", "--model", place / "model", "--task", "recall", "--examples", 5]
    table = printed(*ask, *small, "--picture", place / "heat.png")
    assert "pairs \\ segments" in table
    assert "5 documents per cell, 40 answers in all" in table
    assert (place / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_table_too_wide_for_the_terminal_is_divided_without_breaking_headers(place, printed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    small = [word for key in ("keys=4", "pairs=[1,2]", "segments=[0,1,2,3,1000]") for word in ("--set", key)]
    table = printed("eval", "--model", place[0] / "model", "--task", "recall", "--examples", 2, *small)
    headers = [line.split() for line in table.splitlines() if "segments ┃" in line]
    assert [[word for word in header if word[0].isdigit()] for header in headers] == [["0", "1", "2", "3"], ["1,000"]]
    assert len([line for line in table.splitlines() if line.startswith("│ 2 ")]) == 2


def test_json_of_a_task_with_its_settings_in_a_mix(place, printed):
    place = place[0]
    ask = ["eval", "--model", place / "model", "--data", place / "mix", "--task", "recall", "--set", "segments=[1,2]"]
    figures = json.loads(printed(*ask, "--examples", 6, "--seed", 1, "--json"))
    assert figures["task"]["text"] == "prose"
    assert figures["task"]["segment_length"] == 8
    assert (figures["axis"], figures["examples"], figures["seed"]) == ("pairs", 6, 1)
    assert [(cell["row"], cell["segments"]) for cell in figures["cells"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [cell["answers"] for cell in figures["cells"]] == [6, 6, 12, 12]


def test_any_text_can_be_the_noise(place, printed):
    place = place[0]
    (place / "noise.txt").write_text("Nothing to be found here. " * 40)
    ask = ["eval", "--model", place / "model", "--task", "needle", "--set", "segments=[3]", "--set", "depth=[0.5]"]
    figures = json.loads(printed(*ask, "--text", place / "noise.txt", "--examples", 2, "--json"))
    assert figures["task"]["text"] == str(place / "noise.txt")
    assert [cell["answers"] for cell in figures["cells"]] == [2]


@pytest.mark.parametrize("task", TASKS)
def test_each_task_can_be_evaluated(place, task):
    _, model, tokenizer = place
    fields = {"segments": [4]} | ({"alphabet": 16, "noise": 16} if task in ("copy", "reverse") else {})
    fields |= {"keys": 16, "values": 16, "noise": 16} if task == "recall" else {}
    report = task_accuracy(model, TASKS[task](**fields), tokenizer, examples=2)
    assert report.task["kind"] == task
    assert all(cell.answers >= 2 for cell in report.cells)


def test_bad_input_is_one_line(place, monkeypatch, capsys):
    place = place[0]

    def error(*rest):
        return error_of(monkeypatch, capsys, "eval", "--model", place / "model", *rest)

    assert "nothing to evaluate on: give --data PATH, a task" in error()
    assert "--set, --text and --picture need a task" in error("--data", place / "mix", "--set", "pairs=[1]")
    assert "--max-tokens, --split and --beside do not apply to --task" in error("--task", "copy", "--max-tokens", "5")
    assert "no source of kind 'copy'" in error("--task", "copy", "--data", place / "mix")
    assert "is not a mix" in error("--task", "copy", "--data", place / "model")
    assert "--set paris: unknown key; did you mean 'pairs'?" in error("--task", "recall", "--set", "paris=[1]")
    assert "should be KEY=VALUE" in error("--task", "recall", "--set", "pairs")
    assert "--set pairs: '[1' is not valid TOML" in error("--task", "recall", "--set", "pairs=[1")
    assert "--set text=prose: names a source of a mix" in error("--task", "recall", "--set", "text=prose")
    assert "lower keys, values or noise" in error("--task", "recall", "--set", "keys=300")


def test_the_tasks_are_those_of_a_mix():
    assert TASKS["recall"] is RecallSource
    assert all(TASKS[name].model_fields["kind"].default == name for name in TASKS)
