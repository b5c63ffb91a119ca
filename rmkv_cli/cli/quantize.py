"""`rmkv quantize`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import Json, at_least, print_json
from rmkv_cli.cli.tables import console, table
from rmkv_cli.errors import UserError
from rmkv_cli.progress import progress


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, a checkpoint or a run.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the quantized model goes; must not exist.")],
    bits: Annotated[int, typer.Option(metavar="<8|4>", help="Bits per weight.")] = 8,
    group_size: Annotated[
        int, typer.Option(metavar="<32|64|128>", help="With 4 bits: weights of a row that share a scale.")
    ] = 32,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Leave these layers as they are, by name or its end. Repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Held-out texts on which both models are compared.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(parser=at_least(1), metavar="N", help="Read at most N tokens of them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Store a model's large matrices as integers of 8 or 4 bits, and show what that costs.

    Matrices of attention and feed-forward, embeddings and head are quantized; norms, cells, slots and stores are not.
    """
    from rmkv_cli.config import QuantizationConfig, parse
    from rmkv_cli.training.quantize import quantize_folder

    how = parse(QuantizationConfig, {"bits": bits, "group_size": group_size, "keep": keep or []}, "rmkv quantize")
    if bits == 8 and group_size != 32:
        raise UserError("--group-size is for --bits 4; with 8 bits each row has one scale")
    with progress("comparing", None, "tokens") as advance:
        found = quantize_folder(model, out, how, data, max_tokens, advance)
    if as_json:
        print_json({"folder": str(out)} | asdict(found))
        return
    costs = table("", "weights", "bits per byte", "tokens/s decoding")
    for name, cost in (("before", found.before), (f"{bits} bits", found.after)):
        bits_per_byte = "" if cost.bits_per_byte is None else f"{cost.bits_per_byte:.4f}"
        costs.add_row(name, f"{cost.bytes / 1e6:,.1f} MB", bits_per_byte, f"{cost.tokens_per_second:,.1f}")
    console().print(costs)
    print(f"{out}: a model folder, for --model")
