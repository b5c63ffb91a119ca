"""Small float64 models for tests."""

import torch

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapters import ADAPTER_MARK, attach, select

CELLS = ("gru", "lstm", "minimal")
MEMORIES = (
    *({"cell": cell} for cell in CELLS),
    *({"cell": cell, "store": 0} for cell in CELLS),
    {"store": 1},
    {"update": "published"},
    {"update": "none"},
    {"slots": 0},
    {"slots": 0, "store": 0},
)
PUBLISHED = {"carry": "layers", "update": "published", "store": 0}
POSITIONS = ("rotary", "sinusoidal", "learned")
# Each pair of a memory and a position with one look-back, each other pair with all: a Latin square.
EVERY = [
    (memory, kind, (0, 3, 5)[(i + j) % 3]) for i, memory in enumerate(MEMORIES) for j, kind in enumerate(POSITIONS)
]
# Options of imported transformers, and experts, each alone and all together.
SCALED = {"theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 20}
IMPORTED = (
    {"norm": "rms", "norm_eps": 0.1},
    {"num_attention_heads": 6, "num_key_value_heads": 2},
    {"head_size": 6, "num_key_value_heads": 1},
    {"qkv_bias": True},
    {"qk_norm": True, "norm_eps": 0.1},
    {"rope": {"theta": 100.0}},
    {"rope": SCALED, "head_size": 8},
    {"memory": {"fresh": "hidden"}},
    {"memory": {"store_key": "own"}},
    {"memory": {"store_maps": True}},
    {"memory": {"store_features": 2}},
    {"memory": {"fresh": "hidden", "update": "none", "slots": 1}},
    {"experts": 5, "expert_size": 6},
    {"experts": 3, "experts_per_token": 1, "intermediate_size": 0, "expert_size": 6},
    {
        "norm": "rms",
        "experts": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 8,
        "qkv_bias": True,
        "qk_norm": True,
        "rope": SCALED,
        "lookback": 5,
        "memory": {"fresh": "hidden", "cell": "lstm", "store_key": "own", "store_maps": True, "store_features": 1},
    },
)


def make_model(seed=0, *, memory=None, **shape):
    """A small float64 model with every parameter drawn at random, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 13,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 16,
        "segment_length": 5,
        "lookback": 2,
        "max_position_embeddings": 64,
    }
    model = RMKV(ModelConfig(**defaults | shape, memory=MemoryConfig(**{"slots": 3} | (memory or {}))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval().requires_grad_(False)


def with_adapter(model, targets=(), rank=2, alpha=3.0, seed=1):
    """Return the model with an adapter whose numbers are all random."""
    torch.manual_seed(seed)
    attach(model, select(model, targets), rank, alpha)
    for name, parameter in model.named_parameters():
        if ADAPTER_MARK in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)
