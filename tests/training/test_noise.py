"""Uniformly random tokens cannot be predicted: no causal model gets below ln V, and the published wiring does."""

import math

import pytest

from rmkv_cli.config import MixConfig
from rmkv_cli.data.mix import prepare
from rmkv_cli.training import train
from rmkv_cli.training.metrics import read_metrics

V = 32
FLOOR = math.log(V)


@pytest.fixture(scope="module")
def noise(tokenizer, tmp_path_factory):
    """More tokens than are trained on, so that none can be learned by heart."""
    folder = tmp_path_factory.mktemp("noise")
    source = {"kind": "noise", "name": "noise", "weight": 1, "vocab": V}
    prepare(MixConfig(tokens=600_000, validation=0.1, sources=[source]), folder, tokenizer, folder / "data", workers=1)
    return folder / "data"


def train_on_noise(make_config, noise, run, tokens, **memory):
    config = make_config(
        model={
            "hidden_size": 32,
            "segment_length": 8,
            "lookback": 0,
            "position": "sinusoidal",
            "intermediate_size": 64,
        },
        memory={"slots": 16, "update": "published", "horizon": 1} | memory,
        data=str(noise),
        tokens=tokens,
        batch_size=32,
        micro_batch_size=32,
        replay=False,
        learning_rate=5e-3,
        checkpoint_every=10_000,
        eval_every=10_000,
        eval_tokens=40_000,
    )
    outcome = train(config, run, allow_noncausal=True)
    steps = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    tokens = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *steps], steps, strict=False)]
    return outcome.validation["loss"], [(r["loss"], n) for r, n in zip(steps, tokens, strict=True)]


@pytest.mark.slow
def test_a_causal_model_never_gets_below_the_floor(make_config, noise, tmp_path):
    """By chance a step's loss varies, for a nearly uniform model by less than 1 nat a token: by 1 / sqrt(n)."""
    loss, steps = train_on_noise(make_config, noise, tmp_path / "causal", tokens=200_000)
    assert all(step > FLOOR - 4 / math.sqrt(n) for step, n in steps)
    assert loss > FLOOR - 4 / math.sqrt(40_000)
    assert loss == pytest.approx(FLOOR, abs=0.05)  # it has learned that nothing can be learned


@pytest.mark.slow
def test_the_published_wiring_gets_far_below_it(make_config, noise, tmp_path):
    loss, _ = train_on_noise(make_config, noise, tmp_path / "published", tokens=600_000, carry="layers", store=0)
    assert loss < FLOOR - 0.3
