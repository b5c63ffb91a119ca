"""Model folders: config.json and model.safetensors, found, checked, read and written."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig, parse
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256, whole_file, write_text
from rmkv_cli.progress import stderr

CONFIG, WEIGHTS, CHECKSUMS = "config.json", "model.safetensors", "checksums.json"


def save(model: nn.Module, config: ModelConfig, directory: Path) -> None:
    """Write a model folder's config and weights, each file whole."""
    described = {"model_type": "rmkv", "architectures": ["RMKV"], **config.model_dump()}
    write_text(directory / CONFIG, json.dumps(described, indent=2) + "\n")
    weights = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    save_tensors(weights, directory / WEIGHTS)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole; raise `UserError` where there is no room or no right to."""
    try:
        with whole_file(path) as aside:
            save_file(tensors, aside, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def load(directory: Path, device: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and the weights of the model that `directory` leads to (see `find_model`)."""
    directory = find_model(directory)
    config = read_config(directory)
    path = directory / WEIGHTS
    try:
        return config, load_file(path, device)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: damaged or missing weights: {error}") from None


def assign(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    """Put the weights into a model made without any; raise `UserError` if they are not its own."""
    require_fit(model, weights, directory, CONFIG)
    model.load_state_dict(weights, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def require_fit(model: nn.Module, weights: dict[str, Tensor], directory: Path, config: str) -> None:
    """Raise `UserError` unless the weights are those of the model that `config` describes."""
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    given = {name: tuple(x.shape) for name, x in weights.items()}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{directory}: {WEIGHTS} does not fit {config}: '{name}' is {given.get(name, 'absent')}, should be "
            f"{expected.get(name, 'absent')} ({len(wrong)} such tensors)"
        )


def read_config(directory: Path) -> ModelConfig:
    """Return the config of a model folder; raise `UserError` if it is absent or wrong."""
    path = directory / CONFIG
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("model_type") != "rmkv":
            raise ValueError("its model_type is not 'rmkv'")
    except FileNotFoundError:
        raise UserError(
            f"{directory}: not a model folder (it has no {CONFIG}); wants one, a checkpoint or a run"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the config of an RMKV: {error}") from None
    data.pop("architectures", None)
    return parse(ModelConfig, data, str(path))


def find_model(path: Path, *, training: bool = False) -> Path:
    """Return the model folder that `path` means: itself, or a run's newest whole checkpoint.

    Damaged checkpoints are passed over, each with a line on stderr; `training` asks for the files that training goes on
    from to be whole as well. Raises `UserError` if nothing is left.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; wants a model folder, a checkpoint or a run")
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir() and not (path / "config.toml").exists():
        if (path / CHECKSUMS).exists() and (damage := damaged_file(path, training)):
            raise UserError(f"{path}: {damage} is damaged (its checksum is wrong)")
        return path
    saved = list_checkpoints(path)
    if not saved:
        raise UserError(f"{path}: has no checkpoint yet; go on with its training: rmkv train --resume --run {path}")
    for checkpoint in saved:
        damage = damaged_file(checkpoint, training)
        if damage is None:
            return checkpoint
        stderr().print(f"{checkpoint}: {damage} is damaged; going back to the checkpoint before", style="yellow")
    raise UserError(f"{path}: all its checkpoints are damaged; train again in another --run")


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def write_checksums(directory: Path) -> None:
    """Record the SHA-256 of every file below `directory`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = {str(path.relative_to(directory)): sha256(path) for path in files}
    write_text(directory / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


def damaged_file(directory: Path, training: bool) -> str | None:
    """Return the first file that is not as its recorded checksum says, the record itself if it is missing, or None.

    The folder `training` is looked at only where it is needed: it is twice as large as the model.
    """
    record = directory / CHECKSUMS
    try:
        sums: dict[str, str] = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return CHECKSUMS
    for name, expected in sums.items():
        if name.startswith("training/") and not training:
            continue
        if not (directory / name).is_file() or sha256(directory / name) != expected:
            return name
    return None
