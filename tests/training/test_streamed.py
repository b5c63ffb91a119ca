"""A run that streams its mix: the same rows as from the prepared one, in phases."""

import shutil
import signal

import pytest
from small_run import error_of, written_by

from rmkv_cli.config import dump_toml, load_mix
from rmkv_cli.data.mix import prepare
from rmkv_cli.errors import UserError
from rmkv_cli.model import find_model
from rmkv_cli.training import train
from rmkv_cli.training.metrics import read_metrics
from rmkv_cli.training.trainer import Trainer


def curve(run):
    return list(read_metrics(run / "metrics.jsonl"))


@pytest.mark.slow
def test_it_trains_on_the_rows_of_the_prepared_mix(streamed, data, tokenizer, tmp_path):
    run = train(streamed(), tmp_path / "run").run
    prepare(load_mix(data.parent / "mix.toml"), data.parent, tokenizer, tmp_path / "data", 1)
    prepared = train(streamed(data=str(tmp_path / "data")), tmp_path / "prepared").run
    losses = [[record["loss"] for record in curve(it) if "loss" in record] for it in (run, prepared)]
    shortened = len(losses[0]) - 3  # the prepared mix ends with its tokens, which the lanes read beyond
    assert losses[0][:shortened] == losses[1][:shortened]

    # each phase has its rows
    assert (run / "mix.toml").exists()
    records = [record for record in curve(run) if "loss" in record]
    half = len([record for record in records if record["tokens"] <= 750])
    assert {record["segments"] for record in records[:half]} == {1, 2}
    assert {record["segments"] for record in records[half + 1 :]} == {3}
    assert any("validation" in record for record in curve(run))


def test_a_mix_that_cannot_be_streamed_is_reported_and_leaves_nothing(streamed, tmp_path):
    for keys, message in (
        ({"mix": "pretain"}, "mix 'pretain': no such mix; did you mean 'pretrain'"),
        ({"mix": None}, "no data: give --data DIR"),
        ({"tokenizer": str(tmp_path / "none.json")}, "none.json: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            train(streamed(**keys), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_ends_with_the_data_if_the_mix_does(streamed, data, tmp_path):
    mix = load_mix(data.parent / "mix.toml")
    story = mix.sources[0].model_copy(update={"when_dry": "stop"})
    mix = mix.model_copy(update={"sources": [story], "phases": [], "validation": 0.1})
    (data.parent / "mix.toml").write_text(dump_toml(mix))
    lanes = {"batch_size": 16, "micro_batch_size": 16}
    outcome = train(streamed(tokens=100_000, eval_every=1000, checkpoint_every=1000, **lanes), tmp_path / "run")
    assert (outcome.finished, outcome.exit_code) == (True, 0)
    assert 500 < outcome.tokens < 10_000
    assert outcome.validation is not None
    assert find_model(outcome.run).name == f"step-{outcome.step:08d}"
    again = train(streamed(**lanes), outcome.run, resume=True)
    assert (again.finished, again.step) == (True, outcome.step)


@pytest.mark.slow
def test_a_mix_without_held_out_documents_trains(streamed, data, tmp_path):
    mix = load_mix(data.parent / "mix.toml").model_copy(update={"validation": 0.0})
    (data.parent / "mix.toml").write_text(dump_toml(mix))
    outcome = train(streamed(tokens=300), tmp_path / "run")
    assert outcome.validation is None


@pytest.mark.slow
def test_a_run_resumes_the_same_after_its_files_were_moved(streamed, data, tmp_path, monkeypatch, capsys):
    """The mix that it was made from is gone, and its file is found by a mix elsewhere."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(data.parent / "story.jsonl", folder)
    shutil.copy(data.parent / "mix.toml", folder)
    config = streamed(mix=str(folder / "mix.toml"), tokens=300, eval_every=1000)
    whole = curve(train(config, tmp_path / "whole").run)
    step = Trainer.train_step

    def until_third(trainer, *arguments):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", until_third)
        run = train(config, tmp_path / "run").run
    folder.rename(elsewhere)
    capsys.readouterr()
    resume = ["train", "--resume", "--run", run]
    line = error_of(monkeypatch, capsys, *resume)
    assert line.startswith(f"error: {folder}/story.jsonl: no such file; ")
    assert line.endswith("restore it, or give a mix that finds it with --mix MIX.toml")
    line = error_of(monkeypatch, capsys, *resume, "--mix", folder / "mix.toml")
    assert line == f"error: {folder}/mix.toml: no such file"
    line = error_of(monkeypatch, capsys, *resume, "--mix", "instruct", "--data", "data")
    assert line.startswith("error: --data and --mix: ")
    written_by(monkeypatch, capsys, *resume, "--mix", elsewhere / "mix.toml")
    losses = [[record["loss"] for record in records if "loss" in record] for records in (whole, curve(run))]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 4
    (elsewhere / "mix.toml").unlink()
    written_by(monkeypatch, capsys, *resume)  # which knows their place now, and needs no mix
    with (elsewhere / "story.jsonl").open("a") as file:
        file.write("{}\n")
    line = error_of(monkeypatch, capsys, *resume)
    assert line.startswith(f"error: {elsewhere}/story.jsonl: has changed since the run began; ")


@pytest.mark.slow
def test_files_that_came_after_its_beginning_are_not_read(streamed, data, tmp_path):
    """The run's own mix names its files, in a folder whose name is a pattern."""
    folder = tmp_path / "texts [1]"
    shutil.copytree(data.parent, folder)
    mix = load_mix(folder / "mix.toml")
    story = mix.sources[0].model_copy(update={"files": ["*.jsonl"]})
    (folder / "mix.toml").write_text(dump_toml(mix.model_copy(update={"sources": [story, mix.sources[1]]})))
    config = streamed(mix=str(folder / "mix.toml"), tokens=300)
    run = train(config, tmp_path / "run").run
    assert load_mix(run / "mix.toml").sources[0].files == [str(folder / "story.jsonl")]
