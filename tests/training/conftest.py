import json
import shutil
from pathlib import Path

import pytest
from compare_runs import stop_at
from small_exercises import RECALL
from trained_run import short_samples

from rmkv_cli.config import Config, MixConfig, dump_toml
from rmkv_cli.data.mix import prepare
from rmkv_cli.model import find_model
from rmkv_cli.tokenizer import train_tokenizer
from rmkv_cli.training import train

TEXTS = [f"Line {i} of a short story: the cat sat on mat {i * i % 17}. " * (1 + i % 9) for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def samples():
    with short_samples():
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 300)


@pytest.fixture(scope="session")
def data(tokenizer, tmp_path_factory):
    """A small prepared mix of text, with held-out documents."""
    folder = tmp_path_factory.mktemp("mix")
    (folder / "story.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    mix = MixConfig(validation=0.2, sources=[{"kind": "files", "name": "story", "weight": 1, "files": ["story.jsonl"]}])
    prepare(mix, folder, tokenizer, folder / "data", workers=1)
    return folder / "data"


@pytest.fixture(scope="session")
def make_config(data):
    """A run of 9 steps or so on `data`, with a checkpoint every 2 and a validation every 4."""

    def make(model=None, memory=None, **train):
        return Config.model_validate(
            {
                "model": {
                    "vocab_size": 300,
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 24,
                    "segment_length": 8,
                    "lookback": 4,
                    "memory": {"slots": 2} | (memory or {}),
                }
                | (model or {}),
                "train": {
                    "data": str(data),
                    "tokens": 600,
                    "batch_size": 4,
                    "micro_batch_size": 4,
                    "segments_max": 4,
                    "learning_rate": 1e-2,
                    "final_learning_rate": 1e-3,
                    "precision": "fp32",
                    "device": "cpu",
                    "log_every": 1,
                    "checkpoint_every": 2,
                    "eval_every": 4,
                    "eval_tokens": 200,
                }
                | train,
            }
        )

    return make


@pytest.fixture
def streamed(make_config, tokenizer, data, tmp_path):
    """Makes configs that stream the story of `data` and noise, with rows of 1 or 2, and later 3, segments."""
    mix = MixConfig(
        validation=0.2,
        tokens=1500,
        sources=[
            {"kind": "files", "name": "story", "weight": 3, "files": ["story.jsonl"], "deduplicate": True},
            {"kind": "noise", "name": "noise", "weight": 1, "vocab": 9},
        ],
        phases=[{"share": 1, "segments_max": 2}, {"share": 1, "segments_min": 3, "segments_max": 3}],
    )
    (data.parent / "mix.toml").write_text(dump_toml(mix))
    tokenizer.save(tmp_path / "tokenizer.json")
    places = {"data": None, "mix": str(data.parent / "mix.toml"), "tokenizer": str(tmp_path / "tokenizer.json")}
    return lambda **keys: make_config(**places | {"tokens": 1500} | keys)


@pytest.fixture(scope="session")
def answerer(make_config, tokenizer, tmp_path_factory):
    """A model that has learned the form of the answers: right now and then."""
    folder = tmp_path_factory.mktemp("answerer")
    prepare(MixConfig(tokens=3000, sources=[RECALL | {"segments": [0]}]), folder, tokenizer, folder / "data", workers=1)
    return find_model(train(make_config(data=str(folder / "data"), tokens=2000), folder / "run").run)


@pytest.fixture
def answering(make_config, answerer):
    """A function that makes the config of a run of 9 steps or so."""

    def make(*tasks, samples=4, max_tokens=6, **keys):
        rollouts = {"tasks": tasks or [RECALL], "samples": samples, "max_tokens": max_tokens}
        keys = {"data": None, "from_model": str(answerer), "batch_size": 8, "tokens": 3000} | keys
        return make_config(rollouts=rollouts, **keys)

    return make


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Two runs of the module's `config`: `whole`, to which nothing happened, and `stopped` after 7 of its 9 steps."""
    folder = tmp_path_factory.mktemp("runs")
    train(config, folder / "whole")
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 7)
        train(config, folder / "stopped")
    return folder


@pytest.fixture
def whole(runs):
    return runs / "whole"


@pytest.fixture
def stopped(runs, tmp_path):
    """A copy of the stopped run, to be changed; its newest checkpoint is that of step 7, its best that of 4."""
    return Path(shutil.copytree(runs / "stopped", tmp_path / "stopped", symlinks=True))
