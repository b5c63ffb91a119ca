import json
import sys

import pytest
from custom_tasks import QUESTIONS, make_custom_tasks
from small_run import error_of, rmkv, save_small_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and tasks."""
    place = tmp_path_factory.mktemp("harness")
    save_small_model(place / "model")
    make_custom_tasks(place, ["the"] * len(QUESTIONS))
    return place


@pytest.fixture(autouse=True)
def offline(place, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "hub")}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_json_of_several_tasks_and_nothing_else_on_stdout(place):
    tasks = "own_choice, own_prose,own_writing"
    done = rmkv("eval", "--model", place / "model", "--harness", tasks, "--include", place, "--limit", 5, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["limit"] == 5
    assert [(score["task"], score["metric"]) for score in figures["scores"]] == [
        ("own_choice", "acc"),
        ("own_prose", "bits_per_byte"),
        ("own_writing", "exact_match"),
    ]
    assert all(line.endswith(": done") for line in done.stderr.splitlines())  # progress in our manner, and no bars


def test_a_table(place, printed):
    ask = ["eval", "--model", place / "model", "--harness", "own_choice", "--include", place]
    table = printed(*ask, "--num-fewshot", 1)
    for word in ("own_choice", "acc", "standard error", "lm_eval 0."):
        assert word in table
    assert "not comparable with published scores" not in table
    assert "Only 2 documents per task: not comparable with published scores" in printed(*ask, "--limit", 2)


def test_bad_input_is_one_line(place, monkeypatch, capsys):
    def error(*rest):
        return error_of(monkeypatch, capsys, "eval", "--model", place / "model", *rest)

    assert "--include, --limit and --num-fewshot are for --harness" in error("--data", place, "--limit", 3)
    for other in (["--data", place], ["--task", "copy"], ["--max-tokens", 3], ["--set", "pairs=[1]"]):
        assert "--harness takes only --include, --limit and --num-fewshot" in error("--harness", "piqa", *other)
    assert "--harness: names no task" in error("--harness", " , ")
    assert "absent: no such folder" in error("--harness", "own_choice", "--include", place / "absent")
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # Python's own mark of what cannot be imported
    assert "pip install -c constraints.txt -e '.[harness]'" in error("--harness", "piqa")
