"""Hash models, so that a saved state can name the model that made it."""

import json

import torch
from torch import Tensor

from rmkv_cli.model import RMKV
from rmkv_cli.model.adapters import adapted
from rmkv_cli.model.groups import is_memory_start
from rmkv_cli.model.precision import parameter_dtype
from rmkv_cli.model.tensors import content_hash


def model_hash(model: RMKV) -> str:
    """Return the hexadecimal SHA-256 of the model's config (without defaults) and weights."""
    return _hash(model, model.state_dict())


def rounded_hash(model: RMKV) -> str:
    """Return the `model_hash` of the model rounded to bfloat16, which does not depend on the type it is loaded in."""
    return _hash(model, _rounded(model))


def other_weights_hash(model: RMKV) -> str:
    """Return the `rounded_hash` of the model without the slots and stores that a document starts with."""
    return _hash(model, {name: x for name, x in _rounded(model).items() if not is_memory_start(name)})


def _rounded(model: RMKV) -> dict[str, Tensor]:
    return {name: x.to(parameter_dtype(name, torch.bfloat16)) for name, x in model.state_dict().items()}


def _hash(model: RMKV, weights: dict[str, Tensor]) -> str:
    config = model.config.model_dump(exclude_defaults=True)
    if scales := {name: layer.alpha / layer.rank for name, layer in adapted(model)}:
        config["adapter"] = scales
    return content_hash(weights, json.dumps(config, sort_keys=True).encode())
