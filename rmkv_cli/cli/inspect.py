"""`rmkv inspect`: inspect a trained model."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmkv_cli.cli.loading import Device, load_model
from rmkv_cli.cli.options import Json, Model, at_least, print_json
from rmkv_cli.cli.tables import console, table
from rmkv_cli.errors import UserError
from rmkv_cli.files import require_writable
from rmkv_cli.progress import plural, progress

if TYPE_CHECKING:
    from rmkv_cli.evaluation import MemoryReport
    from rmkv_cli.evaluation.inspect import Attention

app = typer.Typer(no_args_is_help=True, help="Inspect a trained model.")
SHOWN = 3  # tokens of each query in the table; --json has more


@app.callback()
def inspect() -> None:
    """Inspect a trained model."""


@app.command(epilog="Example: rmkv inspect memory --model runs/tiny --file book.txt --picture memory.png")
def memory(
    model: Model,
    file: Annotated[Path, typer.Option(metavar="FILE", help="A text of several segments, ideally many.")],
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the results.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(parser=at_least(0), metavar="N", help="Read at most N tokens.")
    ] = None,
    slots: Annotated[bool, typer.Option("--slots", help="Also show each slot and what it attends to.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show what each layer's memory does on a text: half-life, effective rank, attention, and effect on the loss.

    A slot's half-life is the number of segments after which its mean keep gates halve a value to which nothing is
    added. A store's half-life is the number of segments after which overwriting has halved its content, averaged over
    all keys.
    """
    from rmkv_cli.data.documents import Documents
    from rmkv_cli.evaluation import inspect_memory
    from rmkv_cli.evaluation.pictures import draw_memory, require_matplotlib

    if picture:
        require_matplotlib()
        require_writable(picture)
    rmkv, tokenizer = load_model(model, device)
    documents = Documents.from_files([file], tokenizer, max_tokens)
    total = int(documents.lengths.sum())
    with progress("reading", min(total, max_tokens) if max_tokens else total, "tokens") as advance:
        report = inspect_memory(rmkv, documents, tokenizer, max_tokens=max_tokens, advance=advance)
    if not math.isfinite(report.loss):
        raise UserError(f"{model}: its loss is {report.loss}: the weights are damaged, or the training diverged")
    if picture:
        draw_memory(report, picture)
    if as_json:
        print_json(asdict(report))
    else:
        _print(report)
        if slots and report.layers[0].slots:
            _print_slots(report)


def _print(report: "MemoryReport") -> None:
    layers = table("layer", "slots' half-life", "effective rank", "store's half-life", "effective rank", "loss without")
    for i, layer in enumerate(report.layers):
        half_lives = _range([slot.half_life for slot in layer.slots if slot.half_life is not None])
        store = (_range(layer.store.half_life), _range(layer.store.effective_rank)) if layer.store else ("", "")
        rank = "" if layer.effective_rank is None else f"{layer.effective_rank:.1f}"
        layers.add_row(str(i), half_lives, rank, *store, f"{layer.cost_without:+.4f}")
    layers.add_section()
    layers.add_row("all", "", "", "", "", f"{report.cost_without:+.4f}")
    screen = console()
    screen.print(layers)
    screen.print(
        f"Half-lives are in segments, least to greatest. Losses are in nats per token above {report.loss:.4f}, over "
        f"{plural(report.tokens, 'token')} after the first segment, {plural(report.segments, 'segment')} in all."
    )


def _print_slots(report: "MemoryReport") -> None:
    slots = table("layer", "slot", "half-life", "longest", "on slots", "its query attends to", "its pooling takes")
    for i, layer in enumerate(report.layers):
        for j, slot in enumerate(layer.slots):
            figures = (_number(slot.half_life), _number(slot.half_life_of_longest), f"{slot.on_memory:.0%}")
            slots.add_row(str(i), str(j), *figures, _tokens(slot.attends), _tokens(slot.pools))
        slots.add_section()
    screen = console()
    screen.print(slots)
    screen.print(
        "Half-life and longest: median and 90th percentile over the channels. On slots: the share of the query's "
        "attention on the slots. Each token is shown with its share of the attention and, in brackets, of the text."
    )


def _range(numbers: list[float]) -> str:
    return f"{_number(min(numbers))} to {_number(max(numbers))}" if numbers else ""


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:,.1f}" if number < 1e6 else f"{number:.1e}"


def _tokens(tokens: "list[Attention]") -> str:
    return "\n".join(f"{t.token!r} {t.mass:.0%} ({t.share:.0%})" for t in tokens[:SHOWN])
