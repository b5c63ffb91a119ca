"""Training, decoding and sampling for benchmarks: the shapes that are measured, and random inputs.

The code here runs with other versions of rmkv_cli, too: PYTHONPATH decides which one.
"""

from typing import Any

import numpy as np
import torch

from rmkv_cli.config import Config, load_config, preset_path
from rmkv_cli.data.lanes import InMemory, Lanes
from rmkv_cli.generation import Batch, Decoder, Prompt, SamplingConfig, Text
from rmkv_cli.model import RMKV
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.trainer import Trainer

WIDE = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 1024,
    "segment_length": 512,
    "lookback": 128,
    "memory": {"slots": 32, "store": 2},
}
DEEP = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "norm": "rms",
    "segment_length": 512,
    "lookback": 512,
    "memory": {"slots": 1, "store": 30, "store_key": "own", "store_maps": True, "update": "none", "fresh": "hidden"},
}
SHAPES = ("tiny", "wide")  # the preset; hidden 384, S = 512
MODELS = {"wide": WIDE, "deep": DEEP}  # deep: SmolLM2-135M as an RMKV


class RandomDocuments:
    """An endless queue of documents of random tokens, half to four times as long as a segment."""

    def __init__(self, vocab_size: int, segment_length: int) -> None:
        self._random = np.random.default_rng(0)
        self._vocab_size, self._segment_length = vocab_size, segment_length

    def next(self) -> InMemory:
        """Return the next document."""
        length = self._random.integers(self._segment_length // 2, 4 * self._segment_length)
        return InMemory(self._random.integers(self._vocab_size, size=length))


def config_of(shape: str, precision: str = "fp32", **model: Any) -> Config:
    """Return the config of a shape, or of a preset, with some of the model's fields replaced."""
    if shape in MODELS:
        config = Config.model_validate({"model": MODELS[shape], "train": {"batch_size": 4, "micro_batch_size": 4}})
    else:
        config = load_config(preset_path(shape))
    memory = config.model.memory.model_copy(update=model.pop("memory", {}))
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"memory": memory, **model}),
            "train": config.train.model_copy(update={"precision": precision, "optimizer": "muon", "tokens": 10**12}),
        }
    )


def make_trainer(config: Config) -> Trainer:
    """Return a trainer of a new model on random documents."""
    documents = RandomDocuments(config.model.vocab_size, config.model.segment_length)
    return Trainer(config, Lanes(documents, config.train.batch_size, 0), Ranks("cpu"))


def make_decoder(model: RMKV, lanes: int, *, compiled: bool = False) -> Decoder:
    """Return a decoder with all its lanes taken by texts that have not begun."""
    decoder = Decoder(model, lanes, compiled=compiled)
    for _ in range(lanes):
        decoder.add(model.initial_state(1))
    return decoder


class Repeating:
    """Stands in for a decoder and a tokenizer at once, whose logits and characters are always the same."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.lanes, self.vocab_size = logits.shape
        self._logits = logits

    def add(self, state: Any) -> None:
        """Begin a text."""

    def step(self, token: Any) -> Any:
        """Return the logits of all texts; as a tokenizer's stream, return a token's characters."""
        return "a" if isinstance(token, int) else self._logits

    def stream(self) -> Any:
        """Return what decodes tokens."""
        return self


def make_batch(lanes: int, vocab_size: int, **sampling: Any) -> Batch:
    """Return a batch with texts at all lanes, which never end, whose steps take no time besides that of sampling."""
    torch.manual_seed(0)
    source: Any = Repeating(3 * torch.randn(lanes, vocab_size))
    batch = Batch(source)
    for seed in range(lanes):
        logits = source.step(None)[seed, None]
        prompt = Prompt(1, 0.0, logits, None, torch.zeros_like(logits, dtype=torch.bool))  # type: ignore[arg-type]
        batch.add(Text(source, prompt, SamplingConfig(seed=seed, **sampling), 10**9, ends=()))
    return batch
