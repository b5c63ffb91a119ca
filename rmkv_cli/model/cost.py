"""Costs of a model: parameters by part, operations per token, bytes of state and training. Allocates no weights."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rmkv_cli.config import Config, ModelConfig, TrainConfig
from rmkv_cli.model.adapters import ADAPTER_MARK, attach_configured
from rmkv_cli.model.context import CHUNK
from rmkv_cli.model.groups import PARTS, is_trained, part_of
from rmkv_cli.model.model import RMKV
from rmkv_cli.model.pretrained import find_model
from rmkv_cli.model.size import state_bytes
from rmkv_cli.model.tensors import open_tensors

TRAINING_PASSES = 3  # a training step costs three forward passes: one forward, and a backward pass of twice the cost
ADAPTERS = "adapters"
TOKEN_PARTS = ("attention", "store", "feed_forward", "experts", "norms")
"""Parts of the parameters that process each token."""
MAX_LOGITS = 2**24
"""Largest number of logits that training computes at once."""


@dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of training, in bytes of tensors; activations are an estimate."""

    weights: int
    """Weights; with precision bf16, trained ones in float32 and bfloat16, frozen ones in bfloat16 only."""
    gradients: int
    """Gradients, summed in place over segments and micro-batches."""
    optimizer: int
    """Moments of the optimizer."""
    states: int
    """States of all lanes before and after a step, and those saved between the segments of a row."""
    activations: int
    """Activations of one segment (without replay, of a row), the row's tokens, and the head's inputs and logits."""
    teacher: int
    """Teacher's weights, if its folder is on this machine, and the logits of teacher and student."""
    set_aside: int
    """Frozen weights in float32, next to their bfloat16 copies. They stay in the host's memory, so the total excludes
    them."""

    @property
    def total(self) -> int:
        """Sum of all parts on the device."""
        return sum(asdict(self).values()) - self.set_aside


def count_by_part(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each part; tied embeddings count once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in _meta_model(config).named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def count_trained(config: ModelConfig, train: TrainConfig) -> dict[str, int]:
    """Return the number of trained parameters of each part and of the adapter."""
    counts = dict.fromkeys([*PARTS, ADAPTERS], 0)
    model = _meta_model(config)
    attach_configured(model, train)
    for name, parameter in model.named_parameters():
        part = ADAPTERS if ADAPTER_MARK in name else part_of(name)
        counts[part] += parameter.numel() * is_trained(name, train.ever_trainable)
    return counts


def touched_per_token(config: ModelConfig) -> int:
    """Return the number of parameters that one token's forward pass reads.

    These are all parameters except unused rows of tables, other experts, and the memory's update, which runs once per
    segment.
    """
    counts = count_by_part(config)
    counts["experts"] -= unused_by_a_token(config)
    D = config.hidden_size
    head = config.vocab_size * D
    rows = D * (1 + (config.position == "learned"))
    return sum(counts[part] for part in TOKEN_PARTS) + head + rows


def unused_by_a_token(config: ModelConfig) -> int:
    """Return the number of parameters of the experts that do not process a token."""
    unused = max(config.experts - config.experts_per_token, 0)
    return 3 * config.hidden_size * config.expert_width * unused * config.num_hidden_layers


def forward_flops_per_token(config: ModelConfig) -> dict[str, float]:
    """Return the forward pass's floating-point operations per token by part, in a whole segment of one document.

    A multiplication and an addition count as two operations. Masked scores count, because they are computed.
    """
    D, S, m = config.hidden_size, config.segment_length, config.memory.slots
    F, E = config.intermediate_size, config.experts
    d, H, G = config.head_width, config.num_attention_heads, config.key_value_heads
    Q, KV = H * d, G * d  # widths of all queries, and of all keys or values
    gates = {"gru": 6, "lstm": 8, "minimal": 4}[config.memory.cell]  # D x D matrices of a cell
    keys, C = m + config.lookback + S, min(S, CHUNK)
    # The slots' scores and output; the pooling; the cell.
    update = 4 * Q * m * keys + 2 * m * D * Q + 4 * D * m * S + 2 * gates * m * D * D
    # The gates; W's writes, predictions and reads; products of keys with keys, of queries with keys, and of these with
    # the errors; the linear system.
    p = config.store_key_width
    store = 2 * (D + Q) * (H + G) + (4 * KV + 2 * Q) * p + (2 * (H + G) * p + 2 * Q + G * (d + p)) * C
    store += 2 * (Q + KV) * d * config.memory.store_maps
    per_layer = {
        "attention_matrices": 2 * D * (2 * Q + 2 * KV),
        "attention_scores": 4 * Q * keys,
        "feed_forward": 6 * D * F,
        "experts": 2 * D * E + 6 * D * config.expert_width * config.experts_per_token * (E > 0),
        "memory": (2 * m * D * (Q + 2 * KV) + update * config.memory.updated) / S,
    }
    per_token = {part: float(config.num_hidden_layers * flops) for part, flops in per_layer.items()}
    return per_token | {"store": float(config.stores * store), "head": 2.0 * D * config.vocab_size}


def training_memory(config: ModelConfig, train: TrainConfig, batch: int, row_tokens: int) -> TrainingMemory:
    """Return the peak memory of training on micro-batches of `batch` rows of `row_tokens` tokens."""
    parts, trained_parts = count_by_part(config), count_trained(config, train)
    adapter = trained_parts.pop(ADAPTERS)
    parameters, trained = sum(parts.values()), sum(trained_parts.values())
    D, S = config.hidden_size, config.segment_length
    F = config.intermediate_size + config.expert_width * config.experts_per_token * (config.experts > 0)
    element = 2 if train.precision == "bf16" else 4
    narrow, trained_narrow = (
        sum(count for part, count in counts.items() if part not in ("cells", "store", "initial_memory"))
        for counts in (parts, trained_parts)
    )
    set_aside = 4 * (narrow - trained_narrow) * (train.precision == "bf16")
    segments = -(-row_tokens // S)
    # Vectors and scores in memory at the peak of a segment's backward pass. The coefficients are fitted to measurements
    # of many shapes, to 10% (tests/training/test_memory.py); stores are float32.
    layer = element * (14.2 * D + 4.9 * F) + 109 * config.memory.slots * D / S
    store = D * (5.3 * element + 92)
    if config.memory.store_features:
        H, G, d = config.num_attention_heads, config.key_value_heads, config.head_width
        store += (16.5 * (H + G) + 19 * G * d / min(S, CHUNK)) * config.store_key_width
    per_token_bytes = config.num_hidden_layers * layer + config.stores * store
    # Frozen matrices keep no inputs for gradients, a tenth of all activations; an adapter keeps them again.
    kept = 1.0 if adapter else 1 - 0.1 * (1 - trained / parameters)
    segment = batch * min(S, row_tokens) * per_token_bytes * kept
    others = 0 if train.replay else segments - 1  # segments that keep only their forward pass, 0.8 of the whole
    later = train.batch_size - batch  # lanes of other micro-batches, whose gradients and new states are kept
    gradients = 4 * (trained + adapter)
    # The head runs between the two passes, before there are other gradients. It needs a chunk of logits, its weight's
    # gradient, its input, and the input's gradient, which stays.
    row = batch * row_tokens * D * element
    logits = min(batch * row_tokens * config.vocab_size, MAX_LOGITS) * (8 - element)
    head = logits + 4 * config.vocab_size * D * (trained_parts["embeddings"] > 0) + 3 * row - 0.2 * segment
    return TrainingMemory(
        weights=4 * (parameters + adapter) - set_aside + 2 * (narrow + adapter) * (train.precision == "bf16"),
        gradients=gradients,
        optimizer=optimizer_bytes(config, train),
        states=(train.batch_size + later + batch * segments) * state_bytes(config, 4, element)[0],
        teacher=teacher_bytes(config, train, batch * row_tokens),
        activations=round(segment * (1 + 0.8 * others) + max(row, head - gradients) + 48 * batch * row_tokens),
        set_aside=set_aside,
    )


def teacher_bytes(config: ModelConfig, train: TrainConfig, tokens: int) -> int:
    """Return the bytes that the teacher adds for a micro-batch of `tokens` tokens.

    They are its weights, if downloaded, and a chunk of logits and probabilities of both models.
    """
    teacher = train.teacher
    if teacher.model is None:
        return 0
    weights = 0
    if Path(teacher.model).is_dir():
        for path in find_model(Path(teacher.model)).glob("*.safetensors"):
            with open_tensors(path, "damaged weights") as file:
                weights += sum(math.prod(shape) for _, shape in file.layout.values())
    return weights * (2 if teacher.precision == "bf16" else 4) + 16 * min(tokens * config.vocab_size, MAX_LOGITS)


def optimizer_bytes(config: ModelConfig, train: TrainConfig) -> int:
    """Return the bytes of the optimizer's moments: two per trained parameter, but one for Muon's matrices."""
    counts = count_trained(config, train)
    routers = config.num_hidden_layers * config.experts * (config.hidden_size + 1) * (counts["experts"] > 0)
    matrices = counts["attention"] + counts["feed_forward"] + counts["experts"] - routers
    return 8 * sum(counts.values()) - 4 * matrices * (train.optimizer == "muon")


def tuning_memory(config: Config, batch: int, row_tokens: int) -> dict[str, int]:
    """Return the total of `training_memory` by the value of `train.trainable`."""
    ways = {"all": "all", "adapters": "adapters", "memory start": ["memory start"]}
    return {
        name: training_memory(
            config.model, config.train.model_copy(update={"trainable": way, "stages": []}), batch, row_tokens
        ).total
        for name, way in ways.items()
    }


def describe(config: Config, batch: int, row_tokens: int) -> dict[str, Any]:
    """Return all costs as a report for JSON. The state's size is that of generation, in float32."""
    model, train = config.model, config.train
    parts = count_by_part(model)
    flops = forward_flops_per_token(model)
    at_boundary, at_most = state_bytes(model, 4)
    memory = training_memory(model, train, batch, row_tokens)
    # All segments of a row but its last are replayed; the head is not.
    replayed = (
        train.replay
        * (sum(flops.values()) - flops["head"])
        * (1 - model.segment_length / max(row_tokens, model.segment_length))
    )
    return {
        "parameters": sum(parts.values()),
        "by_part": parts,
        "touched_per_token": touched_per_token(model),
        "flops_per_token": {
            "forward": sum(flops.values()),
            "training": TRAINING_PASSES * sum(flops.values()) + replayed,
            "forward_by_part": flops,
        },
        "state_bytes": {"at_boundary": at_boundary, "at_most": at_most},
        "training_bytes": asdict(memory) | {"total": memory.total},
        "assumed": {
            "lanes": train.batch_size,
            "batch": batch,
            "row_tokens": row_tokens,
            "precision": train.precision,
            "replay": train.replay,
        },
    }


def _meta_model(config: ModelConfig) -> RMKV:
    with torch.device("meta"):  # not quantized: integers would not count as parameters
        return RMKV(config.model_copy(update={"quantization": None}))
