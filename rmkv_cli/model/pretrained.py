"""Find, check, read and write model folders: config.json and model.safetensors."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig, parse
from rmkv_cli.errors import UserError
from rmkv_cli.files import read_json, sha256, write_text
from rmkv_cli.model.adapters import ADAPTER_MARK
from rmkv_cli.model.checkpoints import FOLDER, list_checkpoints
from rmkv_cli.model.precision import parameter_dtype
from rmkv_cli.model.quantized import prepare
from rmkv_cli.model.size import state_bytes
from rmkv_cli.model.tensors import Layout, difference, open_tensors, save_tensors
from rmkv_cli.progress import stderr

if TYPE_CHECKING:
    from rmkv_cli.model.model import RMKV

CONFIG, WEIGHTS, CHECKSUMS = "config.json", "model.safetensors", "checksums.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # types of weights that can be loaded


def save(model: nn.Module, config: ModelConfig, directory: Path) -> None:
    """Write a model folder's config and weights, each file atomically."""
    described = {"model_type": "rmkv", "architectures": ["RMKV"], **config.model_dump()}
    write_text(directory / CONFIG, json.dumps(described, indent=2) + "\n")
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    save_tensors(weights, directory / WEIGHTS)


def read_weights(
    directory: Path,
    model: "RMKV",
    config: str,
    device: str = "cpu",
    prefix: str = "",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return a model folder's weights by their names in `model`, each in the type of the precision policy.

    Weights of an adapter in `model` are not included. The file is mapped and converted tensor by tensor, so the stored
    types need no memory of their own. A quantized model's file is read instead, because the integer kernels need
    aligned memory.

    Args:
        directory: the folder.
        model: the model that the weights are for; its own weights are not read and may be on the meta device.
        config: the file that describes `model`, for messages.
        device: the device of the returned weights.
        prefix: the prefix of the names in the file.
        dtype: the type that the model computes in; None: float64 if all tensors of the file are, else float32.

    Raises:
        UserError: the file is absent or damaged; a tensor is not one of the model's or not floating-point; or weights
            and the state of one text exceed the device's memory. All of this is checked before anything is allocated.
    """
    path = directory / WEIGHTS
    tensors = {f"{prefix}{name}": x for name, x in model.state_dict().items() if ADAPTER_MARK not in name}
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    buffers = {f"{prefix}{name}" for name, _ in model.named_buffers()}  # of quantized layers
    with open_tensors(path, "damaged or missing weights", mapped=not buffers) as file:
        floats = {name: found for name, (found, _) in file.layout.items() if name not in buffers}
        types = set(floats.values())
        if types - set(FLOATS):
            name, found = next((name, found) for name, found in floats.items() if found not in FLOATS)
            kind = str(found).removeprefix("torch.")
            raise UserError(f"{path}: '{name}' has the type {kind}; weights should be float32, bfloat16 or float16")
        dtype = dtype or (torch.float64 if types == {torch.float64} else torch.float32)
        wanted = {
            name: x.dtype if name in buffers else parameter_dtype(name.removeprefix(prefix), dtype)
            for name, x in tensors.items()
        }
        expected: Layout = {
            name: (wanted[name] if name in buffers else file.layout.get(name, (wanted[name],))[0], shape)
            for name, shape in shapes.items()
        }
        if wrong := difference(file.layout, expected):
            raise UserError(f"{directory}: {WEIGHTS} does not fit {config}: {wrong}")
        state = state_bytes(model.config, torch.promote_types(dtype, torch.float32).itemsize, dtype.itemsize)[1]
        needed = sum(math.prod(shape) * wanted[name].itemsize for name, shape in shapes.items()) + state
        if needed > (available := total_memory(device)):
            raise UserError(
                f"{path}: needs {needed / 1e9:,.1f} GB of memory, but the device has {available / 1e9:,.1f} GB"
            )
        return {name.removeprefix(prefix): file.tensor(name).to(device, wanted[name]) for name in shapes}


def assign(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Move weights into a model on the meta device, and empty the dict."""
    model.load_state_dict(weights, assign=True)
    weights.clear()  # a second reference would keep each matrix alive while `prepare` converts it
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    prepare(model)


def total_memory(device: str) -> int:
    """Return the size of the device's memory in bytes."""
    if device == "cuda":
        return torch.cuda.get_device_properties().total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_config(directory: Path) -> ModelConfig:
    """Return the config of a model folder; raise `UserError` if it is absent or invalid."""
    path = directory / CONFIG
    if not path.exists():
        raise UserError(
            f"{directory}: not a model folder (it has no {CONFIG}); give a model folder, a checkpoint or a run"
        )
    data = read_json(path)
    if data.pop("model_type", None) != "rmkv":
        raise UserError(f"{path}: not the config of an RMKV model: its model_type is not 'rmkv'")
    data.pop("architectures", None)
    return parse(ModelConfig, data, str(path))


def find_model(path: Path, *, training: bool = False) -> Path:
    """Return the model folder that `path` refers to: itself, or a run's newest intact checkpoint.

    Damaged checkpoints are skipped, each with a line on stderr.

    Args:
        path: a model folder, a checkpoint or a run.
        training: whether the files that training resumes from must be intact as well.

    Raises:
        UserError: there is no such folder, or it contains no intact model.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a model folder, a checkpoint or a run")
    if not (path / FOLDER).is_dir() and not (path / "config.toml").exists():
        if (path / CHECKSUMS).exists() and (damage := damaged_file(path, training)):
            raise UserError(f"{path}: {damage} is damaged (its checksum is wrong)")
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path}: has no checkpoint yet; resume its training first: rmkv train --resume --run {path}")
    for checkpoint in checkpoints:
        damage = damaged_file(checkpoint, training)
        if damage is None:
            return checkpoint
        stderr().print(f"{checkpoint}: {damage} is damaged; falling back to the previous checkpoint", style="yellow")
    raise UserError(f"{path}: all its checkpoints are damaged; start a new run with another --run")


def write_checksums(directory: Path) -> None:
    """Record the SHA-256 of every file below `directory`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = {str(path.relative_to(directory)): sha256(path) for path in files}
    write_text(directory / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


def damaged_file(directory: Path, training: bool) -> str | None:
    """Return the first file that does not match its recorded checksum, checksums.json itself if absent, or None.

    The folder `training` is checked only if `training` is set, because it is twice as large as the model.
    """
    record = directory / CHECKSUMS
    try:
        sums = read_json(record)
    except UserError:
        return CHECKSUMS
    for name, expected in sums.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:  # outside this folder
            return CHECKSUMS
        if name.startswith("training/") and not training:
            continue
        file = directory / name
        # Hashing a file larger than memory would take minutes. If it is the weights, loading them reports that they
        # do not fit; any other file of that size is damaged.
        large = file.is_file() and file.stat().st_size > total_memory("cpu")
        if large and name == WEIGHTS:
            continue
        if large or not file.is_file() or sha256(file) != expected:
            return name
    return None
