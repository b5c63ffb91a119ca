"""Merging: an adapter into its base model, or several models of one shape into their average."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_directory, require_new
from rmkv_cli.model import RMKV, find_model, inference
from rmkv_cli.model.adapter_file import is_adapter, load_adapter, warn_of_another_base
from rmkv_cli.model.adapters import merged
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model

TOLERANCE = 1e-4  # largest difference between logits before and after merging


def merge_adapter(model: Path, adapter: Path, out: Path) -> float:
    """Write the model folder of a model whose weights hold the adapter's changes, computed in float32.

    Returns:
        The largest difference between the logits of the merged and of the unmerged model, over a segment of tokens and
        a little more.

    Raises:
        UserError: `out` exists, the model and the adapter do not fit, or the logits differ by more than 1e-4.
    """
    require_new(out)
    folder, source = find_model(model), find_model(adapter)
    adapted = RMKV.from_pretrained(folder, dtype=torch.float32)
    require_merges(adapted, model)
    load_adapter(adapted, source)
    warn_of_another_base(source, folder)
    alone = merged(adapted)
    ids = torch.arange(adapted.config.segment_length + 16)[None] * 7919 % adapted.config.vocab_size
    with inference(adapted), inference(alone):
        error = (alone(ids)[0] - adapted(ids)[0]).abs().max().item()
    if not error <= TOLERANCE:  # nor is it "not a number"
        raise UserError(
            f"{adapter}: merging changes logits by {error:.1e}, more than {TOLERANCE:.0e}: its weights are damaged or "
            f"too large; use it unmerged: --adapter {adapter}"
        )
    _write(out, alone, Tokenizer.load(folder))
    return error


def require_merges(model: RMKV, folder: Path) -> None:
    """Raise `UserError` if a model's weights are integers, which nothing can be added to."""
    if model.config.quantization is not None:
        raise UserError(f"{folder}: is quantized; merge the model that it was made from, then quantize the result")


def average(models: Sequence[Path], out: Path) -> None:
    """Write the model folder of the mean of several models' weights, computed in float32.

    Raises:
        UserError: `out` exists, a model is absent, or they differ in config or tokenizer.
    """
    require_new(out)
    folders = [find_model(model) for model in models]
    for model, folder in zip(models, folders, strict=True):
        if is_adapter(folder):
            raise UserError(f"{model}: is an adapter; `rmkv merge MODEL {model}` merges it, one adapter at a time")
    mean, tokenizer = RMKV.from_pretrained(folders[0], dtype=torch.float32), Tokenizer.load(folders[0])
    require_merges(mean, models[0])
    weights = mean.state_dict()
    for count, (model, folder) in enumerate(zip(models[1:], folders[1:], strict=True), 2):
        other = RMKV.from_pretrained(folder, dtype=torch.float32)
        mine, its = mean.config.model_dump(), other.config.model_dump()
        if different := [key for key in mine if mine[key] != its[key]]:
            key = different[0]
            raise UserError(
                f"{model}: model.{key} is {its[key]}, but that of {models[0]} is {mine[key]}; only models of one shape "
                "have an average"
            )
        if Tokenizer.load(folder).hash != tokenizer.hash:
            raise UserError(f"{model}: has another tokenizer than {models[0]}, so their average means nothing")
        for name, x in other.state_dict().items():
            weights[name].lerp_(x, 1 / count)
    _write(out, mean, tokenizer)


def _write(out: Path, model: RMKV, tokenizer: Tokenizer) -> None:
    with atomic_directory(out) as aside:
        write_model(aside, model, tokenizer)
        write_checksums(aside)
