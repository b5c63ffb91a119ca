"""Training and decoding for benchmarks: the shapes that are measured, and a trainer on random documents.

The code here runs with other versions of rmkv_cli, too: PYTHONPATH decides which one.
"""

from typing import Any

import numpy as np

from rmkv_cli.config import Config, load_config, preset_path
from rmkv_cli.data.lanes import InMemory, Lanes
from rmkv_cli.generation import Decoder
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
SHAPES = ("tiny", "wide")  # the preset; hidden 384, S = 512


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
    if shape == "wide":
        config = Config.model_validate({"model": WIDE, "train": {"batch_size": 4, "micro_batch_size": 4}})
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


def make_decoder(model: RMKV, lanes: int) -> Decoder:
    """Return a decoder with all its lanes taken by texts that have not begun."""
    decoder = Decoder(model, lanes)
    for _ in range(lanes):
        decoder.add(model.initial_state(1))
    return decoder
