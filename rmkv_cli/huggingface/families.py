"""Families of pretrained transformers that can be imported: their configs and the names of their weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rmkv_cli.config import ModelConfig, parse
from rmkv_cli.errors import UserError

FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
}
"""Architectures, with their defaults for absent keys of config.json where these differ from Llama's."""
ROPES = ("default", "llama3")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NEUTRAL = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "clip_qkv": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "num_local_experts": None,
    "quantization_config": None,
}
"""Keys of other families that change the computation, with the value that does not."""


class Wiring(NamedTuple):
    """Settings that the source does not determine: see `ModelConfig` and `MemoryConfig`."""

    segment_length: int = 1024
    lookback: int = 1024
    slots: int = 1
    store: int | None = None
    """None: a store in each layer."""


def read_family(described: dict[str, Any], path: Path, wiring: Wiring) -> ModelConfig:
    """Return the config of the RMKV that a transformers config describes.

    Args:
        described: the content of config.json.
        path: its path, for messages.
        wiring: settings that it does not determine.

    Raises:
        UserError: parts of the model cannot be imported (one line each), or values are missing or
            wrong.
    """
    architecture = architecture_of(described)
    keys = FAMILIES.get(architecture, {}) | {key: x for key, x in described.items() if x is not None}
    rope = _rope(keys)
    if wrong := [*_foreign(architecture, keys, rope, wiring)]:
        raise UserError("\n".join(f"{path}: {line}" for line in wrong))
    always = {"MistralForCausalLM": False, "Qwen2ForCausalLM": True}
    return parse(
        ModelConfig,
        {
            **{key: keys[key] for key in REQUIRED},
            "num_key_value_heads": keys.get("num_key_value_heads", keys["num_attention_heads"]),
            "head_size": keys.get("head_dim", 0),
            "segment_length": wiring.segment_length,
            "lookback": wiring.lookback,
            "norm": "rms",
            "norm_eps": keys.get("rms_norm_eps", 1e-6),
            "qkv_bias": always.get(architecture, keys.get("attention_bias", False)),
            "qk_norm": architecture == "Qwen3ForCausalLM",
            "rope": {"theta": rope.get("rope_theta", 10_000.0)}
            | ({key: rope[key] for key in LLAMA3} if rope["rope_type"] == "llama3" else {}),
            "tie_word_embeddings": keys.get("tie_word_embeddings", False),
            "memory": {
                "slots": wiring.slots,
                "update": "none",
                "fresh": "hidden",
                "store": keys["num_hidden_layers"] if wiring.store is None else wiring.store,
                "store_key": "own",
                "store_maps": True,
            },
        },
        str(path),
    )


def architecture_of(described: dict[str, Any]) -> str:
    """Return the architecture that a transformers config names, or else its model type."""
    names = described.get("architectures") or [described.get("model_type")]
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names)


def _rope(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the config's settings of rotary positions.

    transformers 5 stores them in the table `rope_parameters`, version 4 in `rope_scaling` and in top-level keys.
    """
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    found = {key: keys[key] for key in ("rope_theta", "partial_rotary_factor") if key in keys} | rope
    found.setdefault("rope_type", rope.get("type", "default"))
    for key in ("original_max_position_embeddings", "max_position_embeddings"):
        if key in keys:
            found.setdefault("original_max_position_embeddings", keys[key])
    return found


def _foreign(architecture: str, keys: dict[str, Any], rope: dict[str, Any], wiring: Wiring) -> Iterator[str]:
    """Yield a line for each part that cannot be imported, with the supported ones."""
    if architecture not in FAMILIES:
        yield f"architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}"
    for key in REQUIRED:
        if key not in keys:
            yield f"{key} is missing"
    if nested := [key for key, x in rope.items() if isinstance(x, dict)]:
        yield f"rotary positions that differ by kind of layer ({', '.join(nested)}) are not supported"
    elif rope["rope_type"] not in ROPES:
        yield f"rope type '{rope['rope_type']}' is not supported; supported are {' and '.join(map(repr, ROPES))}"
    elif rope["rope_type"] == "llama3" and (absent := [key for key in LLAMA3 if key not in rope]):
        yield f"rope type 'llama3' needs {', '.join(absent)}"
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        yield f"rotary positions on a part of each head (partial_rotary_factor = {part}) are not supported"
    if keys.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act '{keys['hidden_act']}' is not supported; supported is 'silu'"
    window, seen = keys.get("sliding_window"), wiring.segment_length + wiring.lookback
    slides = keys.get("use_sliding_window", not architecture.startswith("Qwen"))
    if slides and isinstance(window, int) and window < seen:
        yield (
            f"a sliding window of {window} tokens is shorter than the {seen} that a token may see here; "
            f"choose --segment-length and --lookback so that they sum to at most {window}"
        )
    for key, neutral in NEUTRAL.items():
        if keys.get(key, neutral) != neutral:
            shown = keys[key].get("quant_method", "") if isinstance(keys[key], dict) else keys[key]
            yield f"{key} ({shown}) is not supported; use a model without it"


def weight_names(config: ModelConfig) -> dict[str, list[str]]:
    """Return, for each weight of the RMKV, the names of the source's tensors that are concatenated along its rows.

    Slots and stores have no counterpart in the source, so they are not included.
    """
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not config.tie_word_embeddings:
        names["unembedding.weight"] = ["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        attention, feed_forward = f"{theirs}.self_attn", f"{theirs}.mlp"
        names[f"{ours}.norm.weight"] = [f"{theirs}.input_layernorm.weight"]
        names[f"{ours}.attention.qkv.weight"] = [f"{attention}.{x}_proj.weight" for x in "qkv"]
        if config.qkv_bias:
            names[f"{ours}.attention.qkv.bias"] = [f"{attention}.{x}_proj.bias" for x in "qkv"]
        if config.qk_norm:
            names[f"{ours}.attention.query_norm.weight"] = [f"{attention}.q_norm.weight"]
            names[f"{ours}.attention.key_norm.weight"] = [f"{attention}.k_norm.weight"]
        names[f"{ours}.attention.out.weight"] = [f"{attention}.o_proj.weight"]
        names[f"{ours}.feed_forward_norm.weight"] = [f"{theirs}.post_attention_layernorm.weight"]
        for part in ("gate", "up", "down"):
            names[f"{ours}.feed_forward.{part}.weight"] = [f"{feed_forward}.{part}_proj.weight"]
    return names
