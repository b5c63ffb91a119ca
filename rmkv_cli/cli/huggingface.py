"""`rmkv export hf`, `rmkv import hf` and `rmkv push`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmkv_cli.cli.loading import Dtype, torch_dtype
from rmkv_cli.cli.options import Json, Model, at_least, print_json
from rmkv_cli.cli.tables import console, table
from rmkv_cli.errors import UserError, pip_install
from rmkv_cli.progress import stderr

if TYPE_CHECKING:
    from rmkv_cli.huggingface import Wiring

CONFIG = "config.json"
DEFAULT_1024 = "[default: 1024]"

export_app = typer.Typer(no_args_is_help=True, help="Export a model to another library's format.")
import_app = typer.Typer(no_args_is_help=True, help="Import a model from another library's format.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder from `rmkv export hf`.")]


@export_app.callback()
def export() -> None:
    """Export a model to another library's format."""


@import_app.callback()
def import_() -> None:
    """Import a model from another library's format."""


@export_app.command("hf", epilog="Example: rmkv export hf exported --model runs/tiny")
def export_hf(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create; must not exist.")],
    model: Model,
    dtype: Dtype = "fp32",
) -> None:
    """Export a model as a folder that Hugging Face transformers loads without rmkv, with model code and model card."""
    weight_dtype = torch_dtype(dtype)
    from rmkv_cli.huggingface import export_folder

    export_folder(model, out, weight_dtype)
    print(f"{out}: a model for transformers; see its README.md")


@import_app.command("hf", epilog="Example: rmkv import hf HuggingFaceTB/SmolLM2-135M-Instruct --out model")
def import_hf(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder from `rmkv export hf`, or a pretrained transformer: a folder, or OWNER/NAME on the hub.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Model folder to create; must not exist.")],
    segment_length: Annotated[
        int | None, typer.Option(parser=at_least(1), metavar="N", help=f"Tokens between memory updates. {DEFAULT_1024}")
    ] = None,
    lookback: Annotated[
        int | None,
        typer.Option(
            parser=at_least(0), metavar="N", help=f"Tokens before a segment that stay visible to it. {DEFAULT_1024}"
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            parser=at_least(0),
            metavar="N",
            help="Memory slots per layer, which the text does not update; the first is an attention sink. [default: 1]",
        ),
    ] = None,
    store: Annotated[
        int | None,
        typer.Option(
            parser=at_least(0), metavar="N", help="Number of layers with a store, from the first. [default: all]"
        ),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option("--check/--no-check", help="Compare the logits with those of transformers.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an exported folder or a pretrained transformer to a model folder.

    An exported folder keeps its weights bit for bit. A transformer (Llama, Mistral, Qwen2 or Qwen3) keeps all its
    weights and gains the window and memory of an RMKV. The other options apply only to transformers.
    """
    from rmkv_cli.data.snapshot import find_snapshot
    from rmkv_cli.huggingface import Wiring, import_folder, is_exported

    options = {"segment_length": segment_length, "lookback": lookback, "slots": slots, "store": store}
    given = {name: x for name, x in options.items() if x is not None}
    folder = find_snapshot(source, [CONFIG])
    if not is_exported(folder):
        _import_transformer(source, out, Wiring(**given), check is not False, as_json)
        return
    if unused := [*given, *(["check"] if check is not None else [])]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError(f"{source}: is already an RMKV; leave out {named}, which only pretrained transformers take")
    import_folder(find_snapshot(source), out)
    if as_json:
        print_json({"folder": str(out)})
    else:
        print(f"{out}: a model folder, for --model")


def _import_transformer(source: str, out: Path, wiring: "Wiring", check: bool, as_json: bool) -> None:
    """Import a pretrained transformer and print where each weight went."""
    from rmkv_cli.evaluation.transformer import has_transformers
    from rmkv_cli.huggingface import import_transformer

    if check and not has_transformers():
        check = False
        note = f"note: logits are not compared, because transformers is not installed: {pip_install('hf')}"
        stderr().print(note, style="yellow")
    found = import_transformer(source, out, wiring, check)
    if as_json:
        print_json({"folder": str(out)} | asdict(found))
        return
    parts = table("source", "imported as", "parameters")
    parts.columns[1].justify = "left"
    for part in found.parts:
        shown = (name.replace("model.", "").replace(".weight", "") for name in (part.source, part.target))
        parts.add_row(*shown, f"{part.parameters:,}")
    console().print(parts)
    if found.check:
        print(
            f"Logits of {found.check.tokens} tokens differ from those of transformers by at most "
            f"{found.check.difference:.1e}; the largest is {found.check.largest:.1f}."
        )
    print(f"{out}: a model folder, for --model; train it so that it learns to use its memory")


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
) -> None:
    """Upload a folder from `rmkv export hf` to the Hugging Face hub, and print the commit's address."""
    from rmkv_cli.huggingface import push_folder

    print(push_folder(folder, repo, private))
