"""Start a run from an existing model: find it, verify its weights, and check that the data match it."""

from pathlib import Path

from rmkv_cli.config import Config, ModelConfig, dump_toml, load_config
from rmkv_cli.config.load import differences, format_value
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256, write_text
from rmkv_cli.model import find_model
from rmkv_cli.model.adapter_file import is_adapter
from rmkv_cli.model.checkpoints import list_checkpoints
from rmkv_cli.model.cost import count_trained
from rmkv_cli.model.pretrained import WEIGHTS, read_config
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer


def pending_source(config: Config, run: Path) -> Path | None:
    """Return the model folder whose weights the run in the folder `run` has to load.

    Return None if the run starts from random weights or has a checkpoint with all weights. Checkpoints of a run that
    trains an adapter contain only the adapter.
    """
    if config.train.from_model is None or (list_checkpoints(run) and config.train.trainable != "adapters"):
        return None
    return Path(config.train.from_model)


def require_trainable(config: Config) -> None:
    """Raise `UserError` if `train.trainable` freezes random weights or selects nothing that can be trained."""
    model, trainable = config.model, config.train.ever_trainable
    require_floats(model, "model.quantization")
    if trainable == "all":
        return
    key = f"train.trainable = {format_value(trainable)}"
    if config.train.from_model is None:
        raise UserError(f"{key}: it freezes random weights; give a model to start from with --from MODEL")
    if not sum(count_trained(model, config.train).values()):
        raise UserError(f"{key}: the model has no such parameters, so nothing would be trained")
    if trainable == ["memory start"] and model.memory.slots and not model.memory.updated:
        raise UserError(f"{key}: memory.update = 'none' leaves no initial memory to train")


def require_floats(model: ModelConfig, name: str) -> None:
    """Raise `UserError` if the model is quantized; `name` is its name in the message."""
    if model.quantization is not None:
        raise UserError(f"{name}: is quantized, so it cannot be trained; train the original model")


def with_source(config: Config, run: Path) -> Config:
    """Return the config with the folder and SHA-256 of the model that the run has to load, if any.

    Raises:
        UserError: there is no such model, its shape differs from the config's, or its SHA-256 from the recorded one; or
            `train.trainable` selects nothing that can be trained.
    """
    require_trainable(config)
    source = pending_source(config, run)
    if source is None:
        return config
    begun = (run / "config.toml").exists()
    if begun and not (source / WEIGHTS).is_file():
        raise UserError(
            f"{source}: the model that the run starts from no longer exists, and no checkpoint has its weights; "
            "restore it, or start a new run with another --run"
        )
    folder = find_model(source).resolve()
    if is_adapter(folder):
        raise UserError(
            f"{source}: is an adapter, not a model to start from; merge it first: rmkv merge MODEL {source} --out DIR"
        )
    source_model = read_config(folder)
    require_floats(source_model, str(source))
    lines = [
        f"{key}: is {format_value(value)}, but {folder}, which the run starts from, has {format_value(expected)}"
        for key, value, expected in differences(config.model, source_model)
    ]
    if lines:
        raise UserError("\n".join(lines))
    digest, recorded = sha256(folder / WEIGHTS), config.train.from_sha256
    if recorded not in (None, digest):
        raise UserError(
            f"{folder / WEIGHTS}: is not the file that the run starts from: its SHA-256 is {digest[:12]}…, but "
            f"train.from_sha256 = {recorded[:12]}…; restore that file, or start a new run with --from"
        )
    update = {"from_model": str(folder), "from_sha256": digest}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def require_tokenizer_of_source(config: Config, run: Path, tokenizer: Tokenizer, location: str) -> None:
    """Raise `UserError` if the tokenizer of the data at `location` is not that of the run's source model."""
    source = pending_source(config, run)
    if source is not None and Tokenizer.load(source).hash != tokenizer.hash:
        raise UserError(
            f"{location}: its tokenizer is not that of the model {source}; prepare the data again with "
            f"--tokenizer {source / 'tokenizer.json'}"
        )


def update_config(config: Config, run: Path) -> None:
    """Write a resumed run's config into its folder if it has changed, and print each change."""
    path = run / "config.toml"
    changes = list(differences(config, load_config(path), "")) if path.exists() else []
    for key, new, old in changes:
        stderr().print(f"{key}: {format_value(old)} before, {format_value(new)} from now on")
    if changes or not path.exists():
        write_text(path, dump_toml(config))
