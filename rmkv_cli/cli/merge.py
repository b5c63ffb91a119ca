"""`rmkv merge`."""

from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.errors import UserError


def merge(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL ADAPTER | MODEL MODEL...", help="A model and its adapter, or models of the same shape."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create; must not exist.")],
) -> None:
    """Merge a LoRA adapter into its model, or average several models of the same shape.

    Both compute in float32. After merging an adapter, logits are compared with those of the unmerged model; a
    difference above 1e-4 is an error. Models may be model folders, checkpoints or runs (their latest checkpoints).
    """
    if len(models) < 2:
        raise UserError("give a model and its adapter, or at least two models")

    from rmkv_cli.model import find_model
    from rmkv_cli.model.adapter_file import is_adapter
    from rmkv_cli.training.merge import average, merge_adapter

    if len(models) == 2 and is_adapter(find_model(models[1])) and not is_adapter(find_model(models[0])):
        model, adapter = models
        error = merge_adapter(model, adapter, out)
        print(f"{out}: {model} with {adapter}; logits differ from the unmerged model's by {error:.1e} at most")
    else:
        average(models, out)
        print(f"{out}: the average of {len(models)} models")
