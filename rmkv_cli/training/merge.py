"""Merge an adapter into its base model, or average several models of the same shape."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.files import require_new
from rmkv_cli.model import RMKV, find_model, inference
from rmkv_cli.model.adapter_file import is_adapter, load_adapter, warn_of_another_base
from rmkv_cli.model.adapters import merged
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model_folder

TOLERANCE = 1e-4  # largest difference between logits before and after merging


def merge_adapter(model: Path, adapter: Path, out: Path) -> float:
    """Merge an adapter into its model's weights, in float32, and write the model folder `out`.

    Returns:
        The largest difference between logits of the merged and the unmerged model, over slightly more than a segment.

    Raises:
        UserError: `out` exists, the adapter does not fit the model, or logits differ by more than 1e-4.
    """
    require_new(out)
    folder, source = find_model(model), find_model(adapter)
    adapted = RMKV.from_pretrained(folder, dtype=torch.float32)
    require_mergeable(adapted, model)
    load_adapter(adapted, source)
    warn_of_another_base(source, folder)
    plain = merged(adapted)
    ids = torch.arange(adapted.config.segment_length + 16)[None] * 7919 % adapted.config.vocab_size
    with inference(adapted), inference(plain):
        error = (plain(ids)[0] - adapted(ids)[0]).abs().max().item()
    if not error <= TOLERANCE:  # also true for nan
        raise UserError(
            f"{adapter}: merging changes logits by {error:.1e}, more than {TOLERANCE:.0e}: its weights are damaged or "
            f"too large; use it unmerged: --adapter {adapter}"
        )
    write_model_folder(out, plain, Tokenizer.load(folder))
    return error


def require_mergeable(model: RMKV, folder: Path) -> None:
    """Raise `UserError` if a model is quantized: nothing can be added to integer weights."""
    if model.config.quantization is not None:
        raise UserError(f"{folder}: is quantized; merge into the original model, then quantize the result")


def average(models: Sequence[Path], out: Path) -> None:
    """Average several models' weights, in float32, and write the model folder `out`.

    Raises:
        UserError: `out` exists, a model is absent, or the models differ in config or tokenizer.
    """
    require_new(out)
    folders = [find_model(model) for model in models]
    for model, folder in zip(models, folders, strict=True):
        if is_adapter(folder):
            raise UserError(f"{model}: is an adapter; `rmkv merge MODEL {model}` merges it, one adapter at a time")
    mean, tokenizer = RMKV.from_pretrained(folders[0], dtype=torch.float32), Tokenizer.load(folders[0])
    require_mergeable(mean, models[0])
    weights = mean.state_dict()
    for count, (model, folder) in enumerate(zip(models[1:], folders[1:], strict=True), 2):
        other = RMKV.from_pretrained(folder, dtype=torch.float32)
        own, its = mean.config.model_dump(), other.config.model_dump()
        if different := [key for key in own if own[key] != its[key]]:
            key = different[0]
            raise UserError(
                f"{model}: model.{key} is {its[key]}, but {models[0]} has {own[key]}; only models of the same shape "
                "can be averaged"
            )
        if Tokenizer.load(folder).hash != tokenizer.hash:
            raise UserError(
                f"{model}: has a different tokenizer than {models[0]}, so their average would be meaningless"
            )
        for name, x in other.state_dict().items():
            weights[name].lerp_(x, 1 / count)
    write_model_folder(out, mean, tokenizer)
