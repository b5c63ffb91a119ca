"""`rmkv eval` saves the evaluations of a run in the run's folder."""

import json
import re
import shutil
from pathlib import Path

import pytest
from trained_run import make_data, train_small_run

from rmkv_cli.evaluation.kept import kept_evaluations

TASK = ["--task", "recall", "--set", "segments=[0,1]", "--set", "pairs=[1,2]", "--set", "segment_length=40"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("kept") / "story")


@pytest.fixture(scope="module")
def run(data):
    return train_small_run(data, data.parent / "run")


def names(run):
    return {path.name for path in (run / "evaluations").glob("*")}


@pytest.mark.slow
def test_a_run_keeps_the_printed_json_with_its_step_and_command(run, data, printed):
    printed_report = json.loads(printed("eval", "--model", run, "--data", data, "--json"))
    kept = json.loads((run / "evaluations" / "validation.json").read_text())
    step = int((run / "latest").resolve().name.removeprefix("step-"))
    assert kept == {
        "step": step,
        "command": f"rmkv eval --model {run} --data {data} --json",
        "report": printed_report,
    }
    assert printed_report["memory"]["tokens"] > 0
    assert json.loads(printed("eval", "--model", run, "--data", data, "--max-tokens", 50, "--json"))["tokens"] == 50
    assert kept_evaluations(run)["validation-max-tokens=50"].report.tokens == 50
    before = names(run)
    printed("eval", "--model", run, "--data", data, "--max-tokens", 50)  # the same measurement takes its place
    assert names(run) == before
    assert "--json" not in kept_evaluations(run)["validation-max-tokens=50"].command


def test_evaluations_on_other_data_splits_and_tasks_have_separate_names(run, data, printed, monkeypatch):
    before = {path: path.read_bytes() for path in (run / "evaluations").glob("*")}
    shutil.copytree(data, data.parent / "else", dirs_exist_ok=True)
    printed("eval", "--model", run, "--data", data, "--split", "train", "--no-memory")
    printed("eval", "--model", run, "--data", data.parent / "else", "--no-memory")
    printed("eval", "--model", run, "--data", data.parent / "story.jsonl", "--no-memory")
    printed("eval", "--model", run, *TASK, "--examples", 2)
    printed("eval", "--model", run, "--data", data.parent / "else")
    task = "recall-pairs=1,2-segment_length=40-segments=0,1-examples=2.json"
    new = names(run) - {path.name for path in before}
    plain = {re.sub("-[0-9a-f]{8}", "-HASH", name) for name in new}
    others = {
        "validation-else-HASH.json",
        "validation-else-no-memory-HASH.json",
        "file-story.jsonl-no-memory-HASH.json",
    }
    assert plain == {"train-no-memory.json", task} | others
    assert len(new) == len(plain)
    assert all(path.read_bytes() == text for path, text in before.items())
    report = kept_evaluations(run)[task.removesuffix(".json")].report
    assert [(cell.row, cell.segments) for cell in report.cells] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_copy_among_the_checkpoints_is_not_the_latest(run, data, tmp_path, printed):
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    shutil.copytree(other / "latest", other / "checkpoints" / "step-00000119-keep")
    printed("eval", "--model", other, "--data", data, "--no-memory")
    step = int((run / "latest").resolve().name.removeprefix("step-"))
    assert kept_evaluations(other)["validation-no-memory"].step == step


@pytest.mark.slow
def test_another_path_content_or_setting_is_a_separate_evaluation(run, printed, tmp_path):
    def new_names(*arguments):
        before = names(run)
        printed("eval", "--model", run, *arguments)
        return len(names(run) - before)

    for folder, text in (("a", "the cat"), ("b", "the cat"), ("b", "the dog")):
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "test.txt"
        file.write_text(text * 50)
        asked = ["--data", file, "--no-memory"]
        assert [new_names(*asked), new_names(*asked), new_names(*asked, "--max-tokens", 9)] == [1, 0, 1]
        assert new_names(*asked, "--max-tokens", 10**6) == 0  # which cuts nothing
    for options in (
        [],
        ["--seed", 1],
        ["--text", tmp_path / "a" / "test.txt"],
        ["--text", tmp_path / "b" / "test.txt"],
    ):
        task = [*TASK, "--examples", 1, *options]
        assert [new_names(*task), new_names(*task)] == [1, 0]
    assert new_names("--task", "recall", *TASK[4:], "--set", "segments=[0, 1]", "--examples", 1) == 0


@pytest.mark.slow
def test_evaluations_saved_by_an_earlier_version_are_still_read(run, data, printed):
    printed("eval", "--model", run, "--data", data)
    old = run / "evaluations" / "file-old.txt.json"
    kept = json.loads((run / "evaluations" / "validation.json").read_text())
    for key in ("beside", "ngram", "long_documents"):
        del kept["report"][key]
    old.write_text(json.dumps(kept))
    assert {"file-old.txt", "validation"} <= kept_evaluations(run).keys()
    printed("report", run, "--out", data.parent / "report")
    assert "file-old.txt, step" in (data.parent / "report" / "report.md").read_text()
    assert (
        "all documents, the short ones only as far as they reach" in (data.parent / "report" / "report.md").read_text()
    )
    old.unlink()


def test_a_model_outside_a_run_saves_no_evaluation(run, data, shown):
    checkpoint = (run / "latest").resolve()
    before = sorted(Path(run).rglob("*"))
    assert "saved for" not in shown("eval", "--model", checkpoint, "--data", data, "--no-memory").err
    assert sorted(Path(run).rglob("*")) == before


def test_results_that_cannot_be_saved_are_printed_with_a_note(run, data, tmp_path, shown):
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True, ignore=shutil.ignore_patterns("evaluations"))
    (other / "evaluations").touch()
    wrote = shown("eval", "--model", other, "--data", data, "--no-memory")
    assert "bits per byte" in wrote.out
    assert f"note: not saved for `rmkv report`: {other / 'evaluations'}" in wrote.err
