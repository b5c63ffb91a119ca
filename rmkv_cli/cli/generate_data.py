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
        str, typer.Argument(metavar="RECIPE", help="A recipe.toml, or the name of a shipped one: stories, say.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .jsonl file to make; must not exist.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, for instance writer.model=runs/instruct."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Have a model write training data: send a recipe's requests, filter the answers, write a row for each.

    Answers are kept in FILE.journal. The same command continues after any interruption and sends no request again
    whose answer is there. The result is a source of a mix.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: should end in .jsonl, so that a mix reads it as rows")
    path = data_recipe_path(recipe)
    base = path.parent if recipe.endswith(".toml") else Path()
    wanted = load_data_recipe(path, overrides or ())

    from rmkv_cli.data.synthetic import generate_data as generate

    write, identity = _writer(wanted.writer, base, device, dtype)
    report = generate(wanted, base, out, write, identity)
    if as_json:
        print_json(report.as_json())
        return
    asked = report.requests - report.answered_before
    print(f"{out}: {plural(report.rows, 'row')} of {plural(report.requests, 'request')}, {asked:,} of them sent now")
    print(f"writer: {plural(report.prompt_tokens, 'token')} read, {report.tokens:,} generated, for all requests")
    for name, rejected in report.rejected.items():
        print(f"rejected by {name}: {plural(rejected.rows, 'answer')}; the first: {rejected.first}")


def _writer(writer: Writer, base: Path, device: str, dtype: str) -> "tuple[Write, str]":
    if writer.url is not None:
        from rmkv_cli.data.synthetic import remote_writer

        return remote_writer(writer)
    from rmkv_cli.generation import local_writer

    return local_writer(*load_model(base / writer.model, device, dtype), writer.parallel)
