"""What may change when a run is resumed, and what may not."""

import re
from pathlib import Path

import pytest
import torch
from compare_runs import curve, stop_at, weights
from small_run import errors_of, written_by

from rmkv_cli.config import TrainConfig, dump_toml, load_config, load_mix
from rmkv_cli.config.resume import CHANGEABLE, FIXED
from rmkv_cli.training import train

PAGE = Path(__file__).parents[2] / "docs" / "finetuning.md"
CONSTANT = {"warmup": 0, "decay": 0, "segments_min": 2, "segments_max": 2}


def test_it_is_decided_and_documented_for_each_key():
    assert {*CHANGEABLE, *FIXED} == TrainConfig.model_fields.keys()
    assert not {*CHANGEABLE} & FIXED.keys()
    page = PAGE.read_text(encoding="utf-8")
    section = page[page.index("## Extending a run") :].split("\n## ")[0]
    may, fixed = (
        {key for row in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
        for part in section.split("What cannot change")
    )
    assert may == {*CHANGEABLE}
    assert fixed == FIXED.keys() | {"model"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepared", "streamed"])
def test_an_extended_run_reads_on_without_a_gap_as_one_run_with_that_budget(
    kind, make_config, streamed, tmp_path, monkeypatch, capsys
):
    """At a constant learning rate the budget is in nothing else, so the weights are the same bit for bit."""
    make = make_config
    if kind == "streamed":
        make, mix = streamed, Path(streamed().train.mix)
        mix.write_text(dump_toml(load_mix(mix).model_copy(update={"phases": []})))
    whole = train(make(tokens=600, **CONSTANT), tmp_path / "whole").run
    run = train(make(tokens=300, **CONSTANT), tmp_path / "run").run
    shown = written_by(monkeypatch, capsys, "train", "--resume", "--run", run, "--set", "train.tokens=600")
    assert "train.tokens: 300 before, 600 from now on" in shown.err
    assert load_config(run / "config.toml") == load_config(whole / "config.toml")
    one, other = ([record for record in curve(each) if "loss" in record] for each in (whole, run))
    assert one == other
    assert all(torch.equal(x, weights(run)[name]) for name, x in weights(whole).items())


def test_every_key_that_may_change_can(make_config, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 3)
    run = train(make_config(), tmp_path / "run").run
    stop_at(monkeypatch, None)
    values = {
        "tokens": 500, "learning_rate": 0.02, "final_learning_rate": 0.002, "schedule": "cosine", "warmup": 0.2,
        "decay": 0.1, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "clip_norm": 2.0, "z_loss": 1e-4,
        "on_bad_step": "skip", "spike_factor": 9.0, "segments_min": 2, "segments_max": 3, "micro_batch_size": 2,
        "precision": "bf16", "replay": False, "compile": False, "device": "auto", "distributed": "fsdp", "log_every": 2,
        "loggers": [], "eval_every": 9, "checkpoint_every": 3, "keep_last": 1,
    }  # fmt: skip
    assert values.keys() == {*CHANGEABLE} - {"epochs", "teacher"}  # see test_length.py and test_distillation.py
    sets = [word for key, value in values.items() for word in ("--set", f"train.{key}={value}")]
    written_by(monkeypatch, capsys, "train", "--resume", "--run", run, *sets)
    assert load_config(run / "config.toml") == make_config(**values)
    last = [record for record in curve(run) if "loss" in record][-1]
    assert 500 <= last["tokens"] < 600
    assert last["learning_rate"] == pytest.approx(0.002)


def test_each_key_that_may_not_change_says_why_and_the_run_is_as_before(make_config, tmp_path, monkeypatch, capsys):
    run = train(make_config(tokens=100), tmp_path / "run").run
    before = (run / "config.toml").read_bytes()
    values = {
        "data": "x", "mix": "x", "tokenizer": "x", "from_model": "x", "from_sha256": "x", "batch_size": 8,
        "optimizer": "muon", "trainable": '["norms"]', "seed": 9, "eval_tokens": 9,
        "stages": '[{kind="extend", share=1}]',
    }  # fmt: skip
    assert values.keys() | {"adapter", "rollouts"} == FIXED.keys()
    sets = [word for key, value in values.items() for word in ("--set", f"train.{key}={value}")]
    more = ["train.adapter.rank=3", "train.rollouts.samples=2", "train.tokens=200", "model.memory.slots=4"]
    sets += [word for key in more for word in ("--set", key)]
    capsys.readouterr()
    lines = errors_of(monkeypatch, capsys, "train", "--resume", "--run", run, *sets)
    assert lines[0].startswith("error: --set model.memory.slots: cannot change on resume from 2 to 4: the weights have")
    said = {
        re.match(r"--set train\.(\w+)[.\w]*: cannot change on resume from .* to .*: .{20}", line)[1]
        for line in lines[1:]
    }
    assert said == FIXED.keys()
    assert (run / "config.toml").read_bytes() == before


def test_a_value_that_the_run_has_already_is_no_change(make_config, tmp_path, monkeypatch, capsys):
    run = train(make_config(tokens=100), tmp_path / "run").run
    before = (run / "config.toml").read_bytes()
    shown = written_by(monkeypatch, capsys, "train", "--resume", "--run", run, "--set", "train.seed=0")
    assert "training is complete" in shown.err
    assert "before" not in shown.err
    assert (run / "config.toml").read_bytes() == before
