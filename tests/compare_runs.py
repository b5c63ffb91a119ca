"""Stop runs and compare them, for tests."""

import os
import shutil
import signal

import torch
from safetensors.torch import load_file

from rmkv_cli.model import find_model
from rmkv_cli.training import train
from rmkv_cli.training.metrics import read_metrics
from rmkv_cli.training.trainer import Trainer

TIMES = {"tokens_per_second", "data_wait", "flops_per_second", "written_tokens_per_second", "learned_tokens_per_second"}


def curve(run):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run / "metrics.jsonl")]


def weights(run):
    return load_file(find_model(run) / "model.safetensors")


def stop_at(monkeypatch, limit, step=Trainer.train_step, number=signal.SIGTERM):
    """Send a signal to this process in step number `limit`."""

    def stopping(self):
        record = step(self)
        if self.step == limit:
            os.kill(os.getpid(), number)
        return record

    monkeypatch.setattr(Trainer, "train_step", stopping)


def stopped_and_resumed(monkeypatch, config, run, step=3):
    """Train in the folder `run`, stop in a step, and resume to the end; return the folder."""
    stop_at(monkeypatch, step)
    train(config, run)
    stop_at(monkeypatch, None)
    return train(config, run, resume=True).run


def assert_same_run(a, b):
    assert curve(a) == curve(b)
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def killed_after(run, step):
    """Return a copy of a run as it was when the checkpoint of this step was just written; its metrics are too long."""
    copy = run.with_name(f"{run.name}-{step}")
    shutil.copytree(run, copy, symlinks=True)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copy
