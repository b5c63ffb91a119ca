"""Small trained runs, for tests."""

import json
from contextlib import contextmanager

import pytest

from rmkv_cli.config import Config, MixConfig
from rmkv_cli.data.mix import prepare
from rmkv_cli.evaluation import sample
from rmkv_cli.tokenizer import train_tokenizer
from rmkv_cli.training import train

TEXTS = [
    f"Line {i} of a <b>story</b>: the `cat` sat on *mat* {i * i % 17} | {i % 5}. " * (1 + i % 9) for i in range(60)
]

SAMPLE_TOKENS = 4


@contextmanager
def short_samples():
    """Keep what validations generate in this process short, since most tests do not look at it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sample, "TEXT_TOKENS", SAMPLE_TOKENS)
        yield


def make_data(folder, source="story", vocab=300):
    """Prepare a mix of text with held-out documents, the most of them longer than a segment; return its folder."""
    folder.mkdir()
    (folder / "story.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sources = [{"kind": "files", "name": source, "weight": 1, "files": ["story.jsonl"]}]
    mix = MixConfig(validation=0.2, sources=sources)
    prepare(mix, folder, train_tokenizer(iter(TEXTS), vocab), folder / "data", workers=1)
    return folder / "data"


def train_small_run(data, run, memory=None, shape=None, **keys):
    """Train some 9 steps, with a validation every 4; return the run's folder."""
    model = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model |= {"intermediate_size": 24, "segment_length": 8, "lookback": 4, "memory": {"slots": 2} | (memory or {})}
    model |= shape or {}
    training = {"data": str(data), "tokens": 600, "batch_size": 4, "micro_batch_size": 4, "segments_max": 4}
    training |= {"learning_rate": 1e-2, "final_learning_rate": 1e-3, "precision": "fp32", "device": "cpu"}
    training |= {"log_every": 1, "checkpoint_every": 2, "eval_every": 4, "eval_tokens": 200}
    config = Config.model_validate({"model": model, "train": training | keys})
    with short_samples():
        return train(config, run).run
