"""kill -9 at random moments, ten times, then resume: the same final weights and the same curve."""

import signal
import subprocess
import sys
import time
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from rmkv_cli.config import dump_toml
from rmkv_cli.model import find_model
from rmkv_cli.training.metrics import read_metrics

TIMES = {"tokens_per_second", "data_wait"}


def rmkv_train(*arguments):
    command = [sys.executable, "-m", "rmkv_cli", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def steps(run):
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def curve(run):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_ten_times_it_ends_as_if_it_had_not_been(make_config, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(make_config(tokens=40_000, checkpoint_every=5, eval_every=20)))
    assert rmkv_train("--config", file, "--run", tmp_path / "whole").wait() == 0

    random, run = Random(0), tmp_path / "killed"
    begin = ["--config", file]
    for _ in range(10):
        process = rmkv_train(*begin, "--run", run)
        further = steps(run) + random.randint(1, 40)
        while steps(run) < further and process.poll() is None:
            time.sleep(random.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
        begin = ["--resume"]
    process = rmkv_train("--resume", "--run", run)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()

    assert curve(run) == curve(tmp_path / "whole")
    one, other = (load_file(find_model(r) / "model.safetensors") for r in (run, tmp_path / "whole"))
    assert all(torch.equal(x, other[name]) for name, x in one.items())
