"""`rmkv config`: show, validate and list configs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import ConfigFile, Json, Overrides, Preset, print_json, read_config
from rmkv_cli.config import dump_toml, list_presets, load_any
from rmkv_cli.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Show, validate and list configs.")


@app.command(epilog="Example: rmkv config show --preset 600m --set model.memory.slots=128")
def show(preset: Preset = None, config: ConfigFile = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a config with all keys, including defaults."""
    resolved = read_config(preset, config, overrides)
    if as_json:
        print_json(resolved.model_dump())
    else:
        sys.stdout.write(dump_toml(resolved))


@app.command(epilog="Example: rmkv config validate my.toml mix.toml")
def validate(files: Annotated[list[Path], typer.Argument(help="Configs of models and of mixes.")]) -> None:
    """Validate configs, and report all errors of all files at once."""
    errors = []
    for file in files:
        try:
            load_any(file)
        except UserError as error:
            errors.append(str(error))
        else:
            print(f"{file}: valid")
    if errors:
        raise UserError("\n".join(errors))


@app.command("list", epilog="Example: rmkv config list")
def list_(as_json: Json = False) -> None:
    """List the shipped presets."""
    presets = list_presets()
    if as_json:
        print_json(presets)
    else:
        for name, line in presets.items():
            print(f"{name:<16} {line}")
