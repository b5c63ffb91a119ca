"""Start a run from an existing model: find it, check that it is the recorded one, and that the data fit it."""

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
    """Return the model folder whose weights the run in the folder `run` still has to load.

    None: the run starts from random weights, or has a checkpoint to resume from. Checkpoints of a run that trains an
    adapter hold the adapter alone.
    """
    if config.train.from_model is None or (list_checkpoints(run) and config.train.trainable != "adapters"):
        return None
    return Path(config.train.from_model)


def require_trainable(config: Config) -> None:
    """Raise `UserError` if `train.trainable` freezes random weights, or selects what cannot be trained."""
    model, trainable = config.model, config.train.ever_trainable
    require_floats(model, "model.quantization")
    if trainable == "all":
        return
    key = f"train.trainable = {format_value(trainable)}"
    if config.train.from_model is None:
        raise UserError(f"{key}: the weights that it freezes are random; give a model to start from, --from MODEL")
    if not sum(count_trained(model, config.train).values()):
        raise UserError(f"{key}: the model has no such parameters, so nothing would be trained")
    if trainable == ["memory start"] and model.memory.slots and not model.memory.updated:
        raise UserError(f"{key}: memory.update = 'none' has no memory that a document could start with")


def require_floats(model: ModelConfig, name: str) -> None:
    """Raise `UserError` if a model of this config and name is quantized."""
    if model.quantization is not None:
        raise UserError(f"{name}: is quantized, so it cannot be trained; train the model that it was made from")


def with_source(config: Config, run: Path) -> Config:
    """Return the config with the folder and SHA-256 of the model that the run starts from, if it still has to load one.

    Raises:
        UserError: there is no such model, it has another shape than the config, or the config records another SHA-256;
            or `train.trainable` does not fit.
    """
    require_trainable(config)
    source = pending_source(config, run)
    if source is None:
        return config
    begun = (run / "config.toml").exists()
    if begun and not (source / WEIGHTS).is_file():
        raise UserError(
            f"{source}: the model that the run starts from is gone, and no checkpoint holds its weights; restore it, "
            "or start again in another --run"
        )
    folder = find_model(source).resolve()
    if is_adapter(folder):
        raise UserError(
            f"{source}: is an adapter, not a model to start from; merge it first: rmkv merge MODEL {source} --out DIR"
        )
    there = read_config(folder)
    require_floats(there, str(source))
    lines = [
        f"{key}: is {format_value(found)}, but {folder}, which the run starts from, has {format_value(its)}"
        for key, found, its in differences(config.model, there)
    ]
    if lines:
        raise UserError("\n".join(lines))
    digest, recorded = sha256(folder / WEIGHTS), config.train.from_sha256
    if recorded not in (None, digest):
        raise UserError(
            f"{folder / WEIGHTS}: is not the file that the run starts from: its SHA-256 is {digest[:12]}…, but "
            f"train.from_sha256 = {recorded[:12]}…; restore that file, or start another run with --from"
        )
    update = {"from_model": str(folder), "from_sha256": digest}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def require_tokenizer_of_source(config: Config, run: Path, tokenizer: Tokenizer, place: str) -> None:
    """Raise `UserError` if the tokenizer of the data at `place` is not that of the model that the run starts from."""
    source = pending_source(config, run)
    if source is not None and Tokenizer.load(source).hash != tokenizer.hash:
        raise UserError(
            f"{place}: its tokenizer is not that of the model {source}; prepare the data again with "
            f"--tokenizer {source / 'tokenizer.json'}"
        )


def keep_config(config: Config, run: Path) -> None:
    """Write a resumed run's config into its folder if it has changed, and print each change."""
    path = run / "config.toml"
    changes = list(differences(config, load_config(path), "")) if path.exists() else []
    for key, new, old in changes:
        stderr().print(f"{key}: {format_value(old)} before, {format_value(new)} from now on")
    if changes or not path.exists():
        write_text(path, dump_toml(config))
