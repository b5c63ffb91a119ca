"""Options that several commands share."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rmkv_cli.config import (
    Config,
    MixConfig,
    list_mixes,
    load_config,
    load_mix,
    load_recipe,
    mix_path,
    preset_path,
    whole_number,
)
from rmkv_cli.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="A shipped config; see `rmkv config list`.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Your own config, a TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for instance model.memory.slots=64."),
]
Model = Annotated[
    Path, typer.Option("--model", metavar="DIR", help="A model folder, a checkpoint, or a run (its latest checkpoint).")
]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Sample from the K most likely tokens; 0 means all.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the fewest most likely tokens whose probabilities add up to this value.")
]
MinP = Annotated[
    float, typer.Option(help="Exclude tokens whose probability is below this fraction of the most likely token's.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Values above 1 discourage tokens that the prompt or the generated text contains.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Lower a token's logit by this much for each time it was generated; -2 to 2.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Lower the logit of every token generated so far by this much; -2 to 2.")
]
NoRepeatNgram = Annotated[
    int, typer.Option(metavar="N", help="Never generate the same N tokens in a row twice; 0 allows it.")
]
MixName = Annotated[
    str | None,
    typer.Argument(
        metavar="MIX", help="A mix.toml (sources and weights), the name of a shipped mix, or a folder or file of texts."
    ),
]
TokenizerFile = Annotated[Path, typer.Option("--tokenizer", help="A tokenizer.json, or a folder with one.")]


def read_mix(name: str | None, preset: str | None, tokens: int | None = None) -> tuple[MixConfig, Path]:
    """Return the mix `name`, or the mix of a preset, and the folder that its files are relative to.

    `name` is that of a shipped mix, or the path of a mix.toml, of a folder with a mix.toml, or of a folder or file of
    texts. `tokens` overrides the length of the mix.
    """
    if (name is None) == (preset is None):
        raise UserError(
            "give one mix: either MIX (a mix.toml, a folder or file of texts, or a shipped mix) or --preset NAME"
        )
    if preset is not None:
        name = load_config(preset_path(preset)).train.mix
        if name is None:
            raise UserError(f"--preset {preset}: has no mix; give one, for instance from `rmkv data sample`")
    assert name is not None
    path = Path(name)
    if (path / "mix.toml").is_file():
        path /= "mix.toml"
    elif path.exists() and path.suffix != ".toml" and name not in list_mixes():
        from rmkv_cli.data.plain import mix_of

        mix, base = mix_of(path)
        return (mix if tokens is None else mix.model_copy(update={"tokens": tokens})), base
    else:
        path = mix_path(name)
    return load_mix(path, tokens), path.parent


def at_least(least: int) -> Callable[[str | int], int]:
    """Return an option's parser of whole numbers (see `whole_number`) that are at least `least`."""

    def parse(given: str | int) -> int:  # Typer also passes defaults, which are numbers
        try:
            number = whole_number(str(given))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if not least <= number < 1 << 63:
            raise typer.BadParameter(f"should be {least} or more and below 2^63, got '{given}'")
        return number

    return parse


def read_config(preset: str | None, file: Path | None, overrides: list[str] | None) -> Config:
    """Return the config of `--preset` or `--config`, with the overrides of `--set`."""
    return load_config(_config_path(preset, file), overrides or ())


def _config_path(preset: str | None, file: Path | None) -> Path:
    if (preset is None) == (file is None):
        raise UserError("give one config: either --preset NAME (see `rmkv config list`) or --config FILE")
    path = preset_path(preset) if preset is not None else file
    assert path is not None
    return path


def read_recipe(preset: str | None, file: Path | None, overrides: list[str], model: Path) -> Config:
    """Return the config of a training that starts from a model.

    `--preset` or `--config`, then `--set`, define the training. The model folder, checkpoint or run defines the model
    and the tokenizer.
    """
    from rmkv_cli.model.pretrained import find_model
    from rmkv_cli.model.pretrained import read_config as read_model

    if any(override.startswith("train.tokenizer=") for override in overrides):
        raise UserError("--set train.tokenizer: --from uses the model's tokenizer; leave this option out")
    path, folder = _config_path(preset, file), find_model(model).resolve()
    config = load_recipe(path, overrides, read_model(folder), preset=preset is not None)
    tokenizer = str(folder / "tokenizer.json")
    update = {"from_model": str(folder), "from_sha256": None, "tokenizer": tokenizer}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def print_json(value: Any) -> None:
    """Print `value` to stdout as indented JSON; if stdout is not UTF-8, non-ASCII characters are escaped."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=not sys.stdout.encoding.lower().startswith("utf"))
    sys.stdout.write("\n")
