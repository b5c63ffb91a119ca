"""The options that several commands share."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rmkv_cli.config import Config, load_config, preset_path
from rmkv_cli.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Preset = Annotated[str | None, typer.Option("--preset", metavar="NAME", help="A shipped config: `rmkv config list`.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A config of your own (TOML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, for instance model.memory.slots=64."),
]
Model = Annotated[
    Path, typer.Option("--model", metavar="DIR", help="A model folder, a checkpoint, or a run (its latest).")
]


def read_config(preset: str | None, file: Path | None, overrides: list[str] | None) -> Config:
    """Return the config that `--preset` or `--config`, then `--set`, describe."""
    if (preset is None) == (file is None):
        raise UserError("give one config: either --preset NAME (`rmkv config list` shows them) or --config FILE")
    path = preset_path(preset) if preset is not None else file
    assert path is not None
    return load_config(path, overrides or ())


def print_json(value: Any) -> None:
    """Print `value` to stdout as indented JSON, its characters escaped where stdout is not UTF-8."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=not sys.stdout.encoding.lower().startswith("utf"))
    sys.stdout.write("\n")
