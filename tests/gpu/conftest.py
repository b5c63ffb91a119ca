"""The GPU smoke suite: `pytest tests/gpu -s`, or with RMKV_GPU_SUITE=cpu the same on the CPU, with small shapes."""

import os
from copy import deepcopy

import numpy as np
import pytest
import torch

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.data.lanes import InMemory, Lanes
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.trainer import Trainer


@pytest.fixture(scope="session", autouse=True)
def device():
    if os.environ.get("RMKV_GPU_SUITE") == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU; RMKV_GPU_SUITE=cpu runs this suite on the CPU")
    return "cuda"


@pytest.fixture(params=["tiny", "125m"])
def preset(request, device):
    if device == "cpu" and request.param != "tiny":
        pytest.skip("too large for a CPU")
    return request.param


class Counting:
    """An endless queue of documents that count up from a random number, which a model learns in a few steps."""

    def __init__(self, vocab_size):
        self.random, self.vocab_size = np.random.default_rng(0), vocab_size

    def next(self):
        start, length = self.random.integers(self.vocab_size), self.random.integers(50, 2000)
        return InMemory((start + np.arange(length)) % min(64, self.vocab_size))


@pytest.fixture
def make_trainer(device):
    """A function that makes a trainer of a preset. Its weights are drawn on the CPU, so every device has the same."""

    def make(preset, **train):
        config = load_config(preset_path(preset))
        keys = {"batch_size": 8, "micro_batch_size": 8, "tokens": 40_000, "optimizer": "adamw"} | train
        config = config.model_copy(update={"train": config.train.model_copy(update=keys)})

        def trainer_on(where):
            lanes = Lanes(Counting(config.model.vocab_size), config.train.batch_size, 0)
            return Trainer(config, lanes, Ranks(where))

        drawn = trainer_on("cpu")
        if device == "cpu":
            return drawn
        trainer = trainer_on(device)
        trainer.model.load_state_dict(deepcopy(drawn.model.state_dict()))
        trainer.working.copy_weights(frozen=True)
        trainer.state = drawn.state.map(lambda x, _: x.to(device))
        return trainer

    return make
