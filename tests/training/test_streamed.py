"""A run that streams its mix: the same rows as from the prepared one, in phases."""

import shutil

import pytest

from rmkv_cli.config import dump_toml, load_mix
from rmkv_cli.data.mix import prepare
from rmkv_cli.errors import UserError
from rmkv_cli.model import find_model
from rmkv_cli.training import train
from rmkv_cli.training.metrics import read_metrics


def curve(run):
    return list(read_metrics(run / "metrics.jsonl"))


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


def test_what_cannot_be_streamed_is_told_and_leaves_nothing(streamed, tmp_path):
    for keys, message in (
        ({"mix": "pretain"}, "mix 'pretain': no such mix; did you mean 'pretrain'"),
        ({"mix": None}, "no data: give --data DIR"),
        ({"tokenizer": str(tmp_path / "none.json")}, "none.json: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            train(streamed(**keys), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_it_ends_with_the_data_where_the_mix_says_so(streamed, data, tmp_path):
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


def test_nothing_need_be_held_out(streamed, data, tmp_path):
    mix = load_mix(data.parent / "mix.toml").model_copy(update={"validation": 0.0})
    (data.parent / "mix.toml").write_text(dump_toml(mix))
    outcome = train(streamed(tokens=300), tmp_path / "run")
    assert outcome.validation is None


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
