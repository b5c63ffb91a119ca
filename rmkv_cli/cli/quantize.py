"""`rmkv quantize`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import Json, at_least, print_json
from rmkv_cli.cli.tables import console, table
from rmkv_cli.errors import UserError


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, a checkpoint or a run.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist.")],
    bits: Annotated[int, typer.Option(metavar="<8|4>", help="Bits per weight.")] = 8,
    group_size: Annotated[
        int, typer.Option(metavar="<32|64|128>", help="With 4 bits: number of weights that share a scale.")
    ] = 32,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Do not quantize these layers: a name or the end of one. Repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Compare on a text file, or on prepared data: its held-out documents, recall and needle tasks.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(parser=at_least(1), metavar="N", help="Read at most N tokens of the text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a model's matrices to 8 or 4 bits, and compare the model before and after.

    Attention, feed-forward, cells, embeddings and head are quantized. Norms, slots, stores and experts are not.
    """
    from rmkv_cli.config import QuantizationConfig, parse
    from rmkv_cli.training.quantize import quantize_folder

    settings = parse(QuantizationConfig, {"bits": bits, "group_size": group_size, "keep": keep or []}, "rmkv quantize")
    if bits == 8 and group_size != 32:
        raise UserError("--group-size is for --bits 4; with 8 bits each row has one scale")
    comparison = quantize_folder(model, out, settings, data, max_tokens)
    if as_json:
        print_json({"folder": str(out)} | asdict(comparison))
        return
    compared = table("", "before", "after")
    for row in comparison.rows():
        compared.add_row(*row)
    console().print(compared)
    print(f"{out}: use it with --model")
