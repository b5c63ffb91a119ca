"""Records reach the loggers as metrics.jsonl has them."""

import json
import os
import subprocess
import sys

import pytest
from compare_runs import curve, killed_after

from rmkv_cli.config import dump_toml
from rmkv_cli.errors import UserError
from rmkv_cli.training import train
from rmkv_cli.training.loggers import INSTALLS, scalars


def test_scalars_are_the_numbers_but_the_step():
    record = {"step": 3, "loss": 2.5, "segments": 4, "bad_step": "words", "validation": {"loss": 2.0, "bits": None}}
    assert scalars(record) == {"loss": 2.5, "segments": 4, "validation/loss": 2.0}


@pytest.mark.parametrize(("name", "install"), INSTALLS.items())
def test_a_missing_logger_is_reported_before_anything_is_written(make_config, tmp_path, monkeypatch, name, install):
    monkeypatch.setitem(sys.modules, name, None)  # Python's own mark of what cannot be imported, installed or not
    with pytest.raises(UserError) as error:
        train(make_config(loggers=[name]), tmp_path / "run")
    assert str(error.value) == f"train.loggers: {name} is not installed; {install}"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tensorboard_has_each_step_once_after_a_kill(make_config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(loggers=["tensorboard"], keep_last=99)
    run = killed_after(train(config, tmp_path / "run").run, 6)
    train(config, run, resume=True)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for key, records in (
        ("loss", {record["step"]: record["loss"] for record in curve(run) if "loss" in record}),
        ("validation/loss", {r["step"]: r["validation"]["loss"] for r in curve(run) if "validation" in r}),
    ):
        assert {event.step: pytest.approx(event.value) for event in events.Scalars(key)} == records
        assert len(events.Scalars(key)) == len(records)


def test_trackio_has_each_step_and_stdout_is_for_results_alone(make_config, tmp_path):
    pytest.importorskip("trackio")
    config = tmp_path / "config.toml"
    config.write_text(dump_toml(make_config(loggers=["trackio"])))
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "rmkv_cli", "train", "--config", config, "--run", tmp_path / "story", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["finished"]
    asked = ["--project", "rmkv", "--run", "story", "--metric", "loss", "--json"]
    command = [sys.executable, "-m", "trackio.cli", "get", "metric", *asked]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    losses = {point["step"]: point["value"] for point in json.loads(found.stdout)["values"]}
    assert losses == {record["step"]: record["loss"] for record in curve(tmp_path / "story") if "loss" in record}
