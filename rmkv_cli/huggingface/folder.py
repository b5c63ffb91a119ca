"""Conversion of model folders to Hugging Face folders and back."""

import json
from pathlib import Path
from typing import Any

import torch

from rmkv_cli.config import MemoryConfig, ModelConfig, RopeConfig, parse
from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_directory, read_json, require_new
from rmkv_cli.generation.sampling import sampling_defaults
from rmkv_cli.huggingface.card import model_card
from rmkv_cli.huggingface.code import CONFIGURATION, MODELING, exported_modules
from rmkv_cli.huggingface.families import architecture_of
from rmkv_cli.huggingface.tokenizer import read_tokenizer, write_tokenizer
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.model.adapter_file import is_adapter
from rmkv_cli.model.precision import is_narrow
from rmkv_cli.model.pretrained import CONFIG, WEIGHTS, assign, read_weights, write_checksums
from rmkv_cli.model.tensors import open_tensors, save_tensors
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model

ARCHITECTURE = "RMKVForCausalLM"
PREFIX = "model."
"""Prefix of the names of the weights, which otherwise are the same as in a model folder."""


def export_folder(model: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that transformers loads without this package; `model` is a model folder, a checkpoint or a run.

    The weights have the types of a model that computes in `dtype` (see `rmkv_cli.model.precision`).

    Raises:
        UserError: `out` exists, or the model is incomplete, an adapter, quantized or not causal.
    """
    require_new(out)
    source = find_model(model)
    if is_adapter(source):
        raise UserError(
            f"{model}: is an adapter; export its base model, or merge them first: rmkv merge MODEL {model} --out DIR"
        )
    rmkv, tokenizer = RMKV.from_pretrained(source, dtype=dtype), Tokenizer.load(source)
    config = rmkv.config
    if config.quantization is not None:
        raise UserError(f"{model}: is quantized; export the model that it was made from")
    if config.memory.carry == "layers":
        raise UserError(f"{model}: is not causal (memory.carry = 'layers'), so it cannot generate and is not exported")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{model}: its tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    roles = tokenizer.roles
    ids = tokenizer.generation_ids() | ({} if roles.pad is None else {"pad_token_id": roles.pad.id})
    described = {
        "model_type": "rmkv",
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.RMKVConfig",
            "AutoModelForCausalLM": f"{MODELING}.{ARCHITECTURE}",
        },
        "dtype": str(dtype).removeprefix("torch."),
        **ids,
        **config.model_dump(),
    }
    ends = [token.id for token in roles.answer_ends]
    never = [*roles.never, *range(tokenizer.vocab_size, config.vocab_size)]
    with atomic_directory(out) as aside:
        _write_json(aside / CONFIG, described)
        write_tokenizer(aside, tokenizer, config.max_position_embeddings if config.position == "learned" else None)
        generation = ids | {"eos_token_id": ends, "suppress_tokens": never} | sampling_defaults()
        _write_json(aside / "generation_config.json", generation)
        save_tensors({f"{PREFIX}{name}": x.detach() for name, x in rmkv.state_dict().items()}, aside / WEIGHTS)
        for name, text in exported_modules().items():
            (aside / name).write_text(text, encoding="utf-8")
        (aside / "README.md").write_text(model_card(out.resolve().name, source, rmkv), encoding="utf-8")


def import_folder(folder: Path, out: Path) -> None:
    """Write the model folder of an exported folder, with the same weights; those of a bfloat16 model stay bfloat16.

    Raises:
        UserError: `out` exists, or `folder` was not exported by rmkv or is damaged.
    """
    require_new(out)
    config = require_exported(folder)
    with torch.device("meta"):
        model = RMKV(config)
    assign(model, read_weights(folder, model, CONFIG, prefix=PREFIX, dtype=_dtype(folder / WEIGHTS)))
    tokenizer = read_tokenizer(folder)
    with atomic_directory(out) as aside:
        write_model(aside, model, tokenizer)
        write_checksums(aside)


def _dtype(weights: Path) -> torch.dtype | None:
    """Return bfloat16 if all weights that may be bfloat16 are, else None."""
    with open_tensors(weights, "damaged or missing weights") as file:
        types = {dtype for name, (dtype, _) in file.layout.items() if is_narrow(name.removeprefix(PREFIX))}
    return torch.bfloat16 if types == {torch.bfloat16} else None


def is_exported(folder: Path) -> bool:
    """Return whether a folder's config says that `export_folder` wrote it.

    Raises:
        UserError: the folder has no config, or is a model folder of rmkv, which needs no import.
    """
    described = read_config(folder)
    if architecture_of(described) == "RMKV":
        raise UserError(f"{folder}: is a model folder of rmkv; `rmkv export hf` makes a Hugging Face folder from it")
    return architecture_of(described) == ARCHITECTURE


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a Hugging Face folder's config.json; raise `UserError` if there is none."""
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder}: is not a Hugging Face folder (it has no {CONFIG})")
    return read_json(path)


def require_exported(folder: Path) -> ModelConfig:
    """Return the config of a folder that `export_folder` wrote; raise `UserError` if it is something else."""
    if not is_exported(folder):
        raise UserError(
            f"{folder}: contains another kind of model ({architecture_of(read_config(folder))}); name a folder that "
            "`rmkv export hf` made"
        )
    described, path = read_config(folder), folder / CONFIG
    keys = {name: x for name, x in described.items() if name in ModelConfig.model_fields}
    for part, section in (("memory", MemoryConfig), ("rope", RopeConfig)):
        if isinstance(given := keys.get(part), dict):
            keys[part] = {name: x for name, x in given.items() if name in section.model_fields}
    return parse(ModelConfig, keys, str(path))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
