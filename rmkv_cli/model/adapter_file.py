"""Read, check and write adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from rmkv_cli.config import Section, parse
from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.files import read_json, sha256, write_text
from rmkv_cli.model.adapters import ADAPTER_MARK, LoRACell, adaptable, adapted, attach
from rmkv_cli.model.pretrained import FLOATS, WEIGHTS, find_model
from rmkv_cli.model.tensors import Layout, difference, open_tensors, save_tensors
from rmkv_cli.progress import stderr

if TYPE_CHECKING:
    from rmkv_cli.model.model import RMKV

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL = "model."  # prefix of weights' names in an exported folder
PREFIX = f"base_model.model.{MODEL}"
DAMAGED = "damaged or missing weights"
PLAIN_LORA: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
"""PEFT's keys that select variants of LoRA, with the values that mean plain LoRA."""


class AdapterFile(Section):
    """The keys of adapter_config.json that a plain LoRA needs."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    """SHA-256 of the base's model.safetensors, in folders that `save_adapter` wrote."""


def is_adapter(directory: Path) -> bool:
    """Return whether a folder contains an adapter rather than a model."""
    return (directory / ADAPTER_CONFIG).exists()


def save_adapter(model: "RMKV", directory: Path, base: Path, base_sha256: str) -> None:
    """Write the model's adapter in PEFT's format.

    PEFT can load it on top of the base model's folder from `rmkv export hf`.

    Args:
        model: the adapted model.
        directory: the folder to write.
        base: the base model's folder.
        base_sha256: SHA-256 of the base's model.safetensors.
    """
    layers = dict(adapted(model))
    first = next(iter(layers.values()))
    cells = [name for name, layer in layers.items() if isinstance(layer, LoRACell)]
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "revision": base_sha256,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{MODEL}{name}" for name in layers if name not in cells],
        "target_parameters": [f"{MODEL}{name}.{weight}" for name in cells for weight in ("weight_ih", "weight_hh")],
    }
    write_text(directory / ADAPTER_CONFIG, json.dumps(described, indent=2) + "\n")
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items() if ADAPTER_MARK in name}
    save_tensors({f"{PREFIX}{name}": x for name, x in weights.items()}, directory / ADAPTER_WEIGHTS)


def load_adapter(model: "RMKV", directory: Path) -> None:
    """Load a folder's adapter into a model that has none.

    Raises:
        UserError: the folder has no adapter; the adapter is not a plain LoRA or has another shape; or the model is
            quantized.
    """
    if model.config.quantization is not None:
        raise UserError(
            f"{directory}: a quantized model cannot take an adapter; merge the adapter into the original model "
            "(rmkv merge), then quantize the result"
        )
    described = _read_config(directory)
    with open_tensors(directory / ADAPTER_WEIGHTS, DAMAGED) as file:
        names = {_layer_name(key) for key in file.layout}
        for key, (_, shape) in file.layout.items():
            if key.endswith("lora_A.weight") and shape[:1] != (described.r,):  # before allocating r rows
                raise UserError(f"{directory}: {ADAPTER_CONFIG} has r = {described.r}, but '{key}' is {shape}")
    alpha = described.lora_alpha * (described.r**0.5 if described.use_rslora else 1)
    attach(model, [name for name in adaptable(model) if name in names], described.r, alpha)
    model.load_state_dict(read_adapter(model, directory), strict=False)


def adapted_copy(model: "RMKV", directory: Path) -> "RMKV":
    """Return a copy of the model with a folder's adapter; it shares the model's weights. Errors: see `load_adapter`."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    load_adapter(copy, directory)
    return copy.train(model.training)


def read_adapter(model: "RMKV", directory: Path) -> dict[str, Tensor]:
    """Return the weights of a folder's adapter by their names in the adapted model, in its types and on its device.

    Raises:
        UserError: the weights are absent or damaged, or do not match the model's adapter.
    """
    path = directory / ADAPTER_WEIGHTS
    own = {f"{PREFIX}{name}": x for name, x in model.state_dict().items() if ADAPTER_MARK in name}
    with open_tensors(path, DAMAGED) as file:
        for key, (dtype, _) in file.layout.items():
            if key not in own:
                known = own.keys() | {f"{PREFIX}{name}.lora_{x}.weight" for name in adaptable(model) for x in "AB"}
                raise UserError(f"{path}: '{key}' matches no parameter of the model{did_you_mean(key, sorted(known))}")
            if dtype not in FLOATS:
                raise UserError(f"{path}: '{key}' has the type {dtype}; weights should be float32, bfloat16 or float16")
        expected: Layout = {key: (file.layout.get(key, (x.dtype,))[0], tuple(x.shape)) for key, x in own.items()}
        if wrong := difference(file.layout, expected):
            raise UserError(f"{directory}: the adapter does not fit the model: {wrong}")
        return {key.removeprefix(PREFIX): file.tensor(key).to(x.device, x.dtype) for key, x in own.items()}


def find_base(directory: Path) -> Path:
    """Return the folder of the base model that an adapter was trained on.

    Raises:
        UserError: the adapter names no base, or the base is absent or its weights have changed.
    """
    described = _read_config(directory)
    if described.base_model_name_or_path is None or not Path(described.base_model_name_or_path).is_dir():
        raise UserError(
            f"{directory}: contains an adapter, but its base model '{described.base_model_name_or_path}' does not exist"
            f"; name the base with --model BASE --adapter {directory}"
        )
    base = find_model(Path(described.base_model_name_or_path))
    if described.revision is not None and described.revision != sha256(base / WEIGHTS):
        raise UserError(
            f"{base}: its weights have changed since the adapter {directory} was trained on them; restore them, or "
            f"name another base with --model BASE --adapter {directory}"
        )
    return base


def warn_of_another_base(directory: Path, base: Path) -> None:
    """Print a warning if a folder's adapter was not trained on the weights of the model folder `base`."""
    revision = _read_config(directory).revision
    if revision is not None and revision != sha256(base / WEIGHTS):
        stderr().print(f"warning: {directory}: this adapter was trained on other weights than {base}", style="yellow")


def _read_config(directory: Path) -> AdapterFile:
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        raise UserError(f"{directory}: not an adapter folder (it has no {ADAPTER_CONFIG})")
    data = read_json(path)
    described = parse(AdapterFile, data, str(path))
    if described.peft_type != "LORA":
        raise UserError(f"{path}: peft_type is {described.peft_type!r}; only LoRA adapters are supported")
    for key, plain in PLAIN_LORA.items():
        if data.get(key, plain) not in (plain, None):
            raise UserError(f"{path}: {key} = {data[key]!r} is not supported; only plain LoRA adapters are")
    return described


def _layer_name(key: str) -> str:
    """Return the name of the layer that a tensor of the file belongs to."""
    return key.removeprefix(PREFIX).partition(f".{ADAPTER_MARK}")[0].removesuffix(".base_layer")
