"""Save and load a tuned memory: trained initial slots and stores, in a small file beside the base model."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.generation.hashes import other_weights_hash
from rmkv_cli.generation.prompt import Prompt, read_tokens, require_fit
from rmkv_cli.model import RMKV
from rmkv_cli.model.groups import is_memory_start
from rmkv_cli.model.tensors import TensorFile, difference, layout, open_tensors, save_tensors
from rmkv_cli.tokenizer import Tokenizer

START = "rmkv-start-1"


def save_start(path: Path, model: RMKV, tokenizer: Tokenizer) -> None:
    """Write the model's initial slots and stores to a safetensors file, atomically.

    Its metadata are the format, the tokenizer's hash, and a hash of the model's config and all other weights. The file
    therefore fits every model that differs only in these slots and stores.

    Raises:
        UserError: the disk is full, or the file may not be written.
    """
    metadata = {"format": START, "model": other_weights_hash(model), "tokenizer": tokenizer.hash}
    save_tensors({name: x.contiguous() for name, x in _start(model).items()}, path, metadata)


def is_start(path: Path) -> bool:
    """Return whether a file is a tuned memory; raise `UserError` if it is damaged."""
    with open_tensors(path, "is damaged or not a notes file") as file:
        return file.metadata.get("format") == START


def read_start(file: TensorFile, model: RMKV, tokenizer: Tokenizer) -> Prompt:
    """Return the reading of an empty document that starts with the memory in the file; its `tokens` are 0.

    Raises:
        UserError: the file is damaged or was made for another model or tokenizer; the model cannot generate.
    """
    require_fit(model, tokenizer)
    path, metadata = file.path, file.metadata
    for what, own in (("tokenizer", tokenizer.hash), ("model", other_weights_hash(model))):
        if (made_for := metadata.get(what, "")) != own:
            raise UserError(
                f"{path}: was tuned for a different {what} ({made_for[:12]}, not {own[:12]}); use the model that the "
                "tuning started from"
            )
    if wrong := difference(file.layout, layout(_start(model))):
        raise UserError(f"{path}: is damaged: {wrong}")
    tensors = {name: x.to(model.memory.device) for name, x in file.tensors().items()}
    if bad := [name for name, x in tensors.items() if not x.isfinite().all()]:
        raise UserError(f"{path}: is damaged: '{bad[0]}' has numbers that are not finite")
    memory = tensors.pop("memory")
    before = model.initial_state(1)
    state = replace(
        before,
        memory=memory[:, None],
        store=torch.stack(list(tensors.values()))[:, None] if tensors else None,
        owner=torch.zeros_like(before.owner),
        store_owner=torch.zeros_like(before.owner),
        document=torch.zeros_like(before.owner),
    )
    row = (1, model.config.vocab_size)
    seen = torch.zeros(row, dtype=torch.bool, device=memory.device)
    nothing = Prompt(0, 0.0, torch.empty(row, device=memory.device), state, seen)
    return replace(read_tokens(model, [tokenizer.opening], nothing), tokens=0, seconds=0.0)


def _start(model: RMKV) -> dict[str, Tensor]:
    """Return the parameters of a document's initial memory by name, stores in the order of the layers."""
    return {name: x.detach() for name, x in model.named_parameters() if is_memory_start(name)}
