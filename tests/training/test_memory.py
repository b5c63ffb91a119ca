"""The estimate of training memory is within a tenth of what the tensors take."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmkv_cli.config import Config
from rmkv_cli.data.lanes import Rows
from rmkv_cli.model.cost import state_bytes, training_memory
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.trainer import Trainer


class Peak(TorchDispatchMode):
    """Adds up the bytes of all tensors that live, and keeps the most."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.live.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return output


class Zeros:
    """Lanes whose documents never end, and whose tokens are all the same."""

    def __init__(self, lanes):
        self.lanes = lanes

    def next(self, length):
        zeros = np.zeros((self.lanes, length), dtype=np.int64)
        return Rows(zeros, zeros, zeros)


def measured(config, segments):
    """The peak of the second of two steps."""
    with Peak() as peak:
        trainer = Trainer(config, Zeros(config.train.batch_size), Ranks("cpu"))
        for parameter in trainer.model.parameters():
            peak.note(parameter)
        for _ in range(2):
            peak.peak = peak.now
            trainer.train_step(segments)
        return peak.peak


SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "segment_length": 64,
    "lookback": 32,
}
WIDE = {"hidden_size": 256, "intermediate_size": 768}


@pytest.mark.parametrize(
    ("segments", "model", "memory", "train"),
    [
        (2, {}, {}, {}),
        (4, {}, {}, {}),
        (2, {"hidden_size": 128, "segment_length": 128}, {}, {"precision": "bf16"}),
        (2, {"vocab_size": 4096}, {"slots": 32}, {}),
        (4, {"vocab_size": 32768}, {}, {}),
        (4, {}, {"store": 0}, {"batch_size": 16}),
        (2, {}, {"store": 1}, {}),
        (2, {}, {"store_features": 2}, {}),
        (3, WIDE, {"store_features": 4}, {"precision": "bf16"}),
        (4, {}, {}, {"replay": False}),
        (3, WIDE, {}, {"batch_size": 4, "micro_batch_size": 1}),
        (3, WIDE, {}, {"batch_size": 8, "precision": "bf16", "optimizer": "muon"}),
        (3, WIDE, {}, {"batch_size": 8, "precision": "bf16", "trainable": ["memory start"]}),
        (4, {"vocab_size": 32768}, {}, {"trainable": ["memory start"]}),
        (2, {}, {}, {"trainable": ["norms", "memory"]}),
        (3, WIDE, {}, {"batch_size": 8, "precision": "bf16", "optimizer": "muon", "trainable": ["attention"]}),
        (3, WIDE, {}, {"batch_size": 8, "precision": "bf16", "trainable": "adapters", "adapter": {"rank": 8}}),
        (2, {}, {}, {"trainable": "adapters", "adapter": {"rank": 4}}),
        (2, {}, {}, {"trainable": "adapters", "adapter": {"rank": 32}}),
    ],
    ids=[
        "rows",
        "long rows",
        "bf16",
        "words and slots",
        "two chunks of logits",
        "lanes",
        "one store",
        "features of keys",
        "more features of wide keys",
        "no replay",
        "more weights than tokens",
        "as the presets train",
        "memory tuning",
        "memory tuning, two chunks of logits",
        "norms and memory",
        "attention alone",
        "an adapter",
        "an adapter of low rank",
        "an adapter of high rank",
    ],
)
def test_the_estimate_matches_the_tensors(segments, model, memory, train):
    train = {"batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "tokens": 10**9} | train
    config = Config.model_validate({"model": SHAPE | model | {"memory": {"slots": 8} | memory}, "train": train})
    row = segments * config.model.segment_length
    estimate = training_memory(config.model, config.train, config.train.micro_batch_size, row)
    assert estimate.total + estimate.set_aside == pytest.approx(measured(config, segments), rel=0.1)


@pytest.mark.parametrize(("precision", "window"), [("fp32", 4), ("bf16", 2)])
def test_the_states_of_a_training_have_the_estimated_size(precision, window):
    config = Config.model_validate({"model": SHAPE, "train": {"batch_size": 8, "precision": precision}})
    state = Trainer(config, None, Ranks("cpu")).state
    assert state.size() == pytest.approx(8 * state_bytes(config.model, 4, window)[0], rel=0.001)


@pytest.mark.slow
def test_with_replay_rows_sixteen_times_as_long_take_little_more_than_states_and_what_the_head_reads():
    train = {"batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "tokens": 10**9}
    shape = SHAPE | {"memory": {"slots": 8}, "vocab_size": 8192}  # the short rows make one full chunk of logits
    config = Config.model_validate({"model": shape, "train": train})
    short, long = (measured(config, segments) for segments in (8, 128))
    states = 4 * 120 * state_bytes(config.model, 4)[0]
    vectors = 3 * 4 * 120 * 64 * 64 * 4  # for each token what the head reads, in parts and as a whole, and its gradient
    print(f"8 segments: {short:,} bytes; 128: {long:,}, {states:,} for states and {vectors:,} for the head more")
    assert long <= 1.1 * short + states + vectors
