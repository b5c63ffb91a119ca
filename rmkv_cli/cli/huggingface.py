"""`rmkv export hf`, `rmkv import hf` and `rmkv push`."""

from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.loading import Dtype, torch_dtype
from rmkv_cli.cli.options import Model

export_app = typer.Typer(no_args_is_help=True, help="Write a model in another library's form.")
import_app = typer.Typer(no_args_is_help=True, help="Read a model from another library's form.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `rmkv export hf` made.")]


@export_app.callback()
def export() -> None:
    """Write a model in another library's form."""


@import_app.callback()
def import_() -> None:
    """Read a model from another library's form."""


@export_app.command("hf", epilog="Example: rmkv export hf exported --model runs/tiny")
def export_hf(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Where the folder goes; must not exist.")],
    model: Model,
    dtype: Dtype = "fp32",
) -> None:
    """Write a folder that Hugging Face's transformers loads without rmkv, with the model's code and card."""
    narrow = torch_dtype(dtype)
    from rmkv_cli.huggingface import export_folder

    export_folder(model, out, narrow)
    print(f"{out}: a model for transformers; see its README.md")


@import_app.command("hf", epilog="Example: rmkv import hf exported --out model")
def import_hf(
    folder: Folder,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model folder goes; must not exist.")],
) -> None:
    """Write the model folder of a Hugging Face folder, with the same weights, bit for bit."""
    from rmkv_cli.huggingface import import_folder

    import_folder(folder, out)
    print(f"{out}: a model folder, for --model")


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Of the hub; made where it is absent.")],
    private: Annotated[bool, typer.Option("--private", help="Make it so that only its owner sees it.")] = False,
) -> None:
    """Upload a folder that `rmkv export hf` made to the Hugging Face hub, and print the commit's address."""
    from rmkv_cli.huggingface import push_folder

    print(push_folder(folder, repo, private))
