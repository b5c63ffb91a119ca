"""`rmkv data generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmkv_cli.cli.loading import Device, Dtype, load_model
from rmkv_cli.cli.options import Json, print_json
from rmkv_cli.config import Writer, data_recipe_path, load_data_recipe
from rmkv_cli.errors import UserError
from rmkv_cli.progress import plural

if TYPE_CHECKING:
    from rmkv_cli.data.synthetic import Write


def generate_data(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe.toml, or the name of a shipped recipe such as stories.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .jsonl file to create; must not exist.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for instance writer.model=runs/instruct."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate training data with a model: send a recipe's requests, filter the answers, write one row per answer.

    Answers are saved in FILE.journal. After an interruption, the same command continues and does not repeat answered
    requests. The result is a source of a mix.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: should end in .jsonl, so that a mix reads each line as a row")
    path = data_recipe_path(recipe)
    base = path.parent if recipe.endswith(".toml") else Path()
    settings = load_data_recipe(path, overrides or ())

    from rmkv_cli.data.synthetic import generate_data as generate

    write, identity = _writer(settings.writer, base, device, dtype)
    report = generate(settings, base, out, write, identity)
    if as_json:
        print_json(report.as_json())
        return
    sent = report.requests - report.answered_before
    print(f"{out}: {plural(report.rows, 'row')} from {plural(report.requests, 'request')}, {sent:,} of them sent now")
    print(f"writer: {plural(report.prompt_tokens, 'token')} read, {report.tokens:,} generated, for all requests")
    for name, rejected in report.rejected.items():
        print(f"rejected by {name}: {plural(rejected.rows, 'answer')}; the first: {rejected.first}")


def _writer(writer: Writer, base: Path, device: str, dtype: str) -> "tuple[Write, str]":
    if writer.url is not None:
        from rmkv_cli.data.synthetic import remote_writer

        return remote_writer(writer)
    from rmkv_cli.generation import local_writer

    return local_writer(*load_model(base / writer.model, device, dtype), writer.parallel)
