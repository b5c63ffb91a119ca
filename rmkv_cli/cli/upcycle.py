"""`rmkv upcycle`."""

from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import at_least


def upcycle(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, a checkpoint or a run.")],
    experts: Annotated[int, typer.Option(parser=at_least(1), metavar="N", help="Number of experts per layer.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist.")],
    experts_per_token: Annotated[
        int, typer.Option(parser=at_least(1), metavar="N", help="Number of experts that process each token.")
    ] = 2,
    expert_size: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="Width of an expert; 0: that of the feed-forward.")
    ] = 0,
) -> None:
    """Give a dense model experts: the same function at first, with more parameters to train.

    The feed-forward of each layer becomes the experts' shared expert. Train the result with `rmkv train --from DIR`.
    """
    from rmkv_cli.training.upcycle import upcycle as write

    result = write(model, out, experts, experts_per_token, expert_size)
    print(f"{out}: {result.count_parameters():,} parameters; train it with: rmkv train --from {out}")
