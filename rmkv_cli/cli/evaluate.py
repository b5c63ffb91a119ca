"""`rmkv eval`."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmkv_cli.cli.evaluate_harness import evaluate_harness
from rmkv_cli.cli.evaluate_task import evaluate_task
from rmkv_cli.cli.loading import Adapter, Device, Dtype, find_and_load, torch_dtype
from rmkv_cli.cli.options import Json, Model, at_least, print_json
from rmkv_cli.cli.save_evaluation import save_evaluation
from rmkv_cli.cli.tables import console, size, table
from rmkv_cli.errors import UserError
from rmkv_cli.progress import plural, progress, stderr

if TYPE_CHECKING:
    from rmkv_cli.data.documents import Documents
    from rmkv_cli.evaluation import Score
    from rmkv_cli.evaluation.beside import Beside
    from rmkv_cli.evaluation.kept import DocumentsReport
    from rmkv_cli.tokenizer import Tokenizer


def evaluate(
    model: Model,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A folder from `rmkv data mix`, a text file, or a mix.toml.")
    ] = None,
    split: Annotated[
        Literal["validation", "train"], typer.Option(help="Split of a prepared mix to evaluate on.")
    ] = "validation",
    max_tokens: Annotated[
        int | None,
        typer.Option(parser=at_least(0), metavar="N", help="Evaluate on a sample of at most N tokens."),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option("--memory/--no-memory", help="Also measure how much the memory helps (three more passes)."),
    ] = True,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="HF_MODEL", help="Compare with a causal model of transformers: a folder, or OWNER/NAME on the hub."
        ),
    ] = None,
    task: Annotated[
        Literal["recall", "copy", "reverse", "needle", "facts"] | None,
        typer.Option(help="Measure accuracy on this task instead, with its settings in the mix of --data or defaults."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the task, for instance pairs=[1,16]."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", metavar="FILE", help="Use this text as the task's noise.")
    ] = None,
    examples: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="Documents for each difficulty of the task.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the task's documents.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the task's accuracies as a heat map.")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(metavar="TASK,TASK", help="Run tasks of lm-evaluation-harness instead, for instance piqa."),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with the YAML files of your own tasks for --harness.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(parser=at_least(1), metavar="N", help="Use only the first N documents of each harness task."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(parser=at_least(0), metavar="N", help="Solved examples before each question of a harness task."),
    ] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity, bits per byte and the effect of the memory on held-out documents or on any file.

    With --task, measure accuracy by memory load and by distance. With --harness, report the model's scores on tasks of
    lm-evaluation-harness.
    """
    if harness is not None:
        if data or task or beside or max_tokens is not None or split != "validation" or overrides or picture or text:
            raise UserError("--harness takes only --include, --limit and --num-fewshot: its tasks bring their own data")
        evaluate_harness(model, harness, include, limit, num_fewshot, device, dtype, adapter, as_json)
        return
    if include or limit is not None or num_fewshot is not None:
        raise UserError("--include, --limit and --num-fewshot are for --harness")
    if task:
        if max_tokens is not None or split != "validation" or beside:
            raise UserError("--max-tokens, --split and --beside do not apply to --task, which generates its documents")
        settings = overrides or (), text or (), examples, seed
        evaluate_task(model, task, data, *settings, picture, device, dtype, adapter, as_json)
        return
    if data is None:
        raise UserError("nothing to evaluate on: give --data PATH, a task (--task recall) or --harness piqa")
    if overrides or picture or text:
        raise UserError("--set, --text and --picture need a task, for instance --task recall")

    from rmkv_cli.evaluation import measure, measure_baseline, memory_effect
    from rmkv_cli.evaluation.beside import measure_beside
    from rmkv_cli.evaluation.kept import DocumentsReport, documents_name
    from rmkv_cli.evaluation.transformer import load_transformer, load_transformer_tokenizer

    checkpoint, rmkv, tokenizer = find_and_load(model, device, dtype, adapter)
    documents = _open(data, split, tokenizer, model, max_tokens)
    if rmkv.config.memory.carry == "layers":
        stderr().print(
            "warning: memory.carry = 'layers' lets tokens see later tokens, so this loss is not that of a causal model",
            style="yellow",
        )
    total = int(documents.lengths.sum())
    total = min(total, max_tokens) if max_tokens else total
    compared = None
    with progress("evaluating", total, "tokens") as advance:
        if beside:
            other = load_transformer(beside, str(rmkv.memory.device), torch_dtype(dtype))
            both = (rmkv, tokenizer), (other, load_transformer_tokenizer(beside))
            report, compared = measure_beside(*both, beside, documents, max_tokens=max_tokens, advance=advance)
        else:
            report = measure(rmkv, documents, max_tokens=max_tokens, tokenizer=tokenizer, advance=advance)
    if not math.isfinite(report.loss):
        raise UserError(f"{model}: its loss is {report.loss}: the weights are damaged, or the training diverged")
    effect = None
    if memory:
        try:
            with progress("measuring the effect of the memory", None, "tokens") as advance:
                effect = memory_effect(rmkv, documents, max_tokens=max_tokens, tokenizer=tokenizer, advance=advance)
        except UserError as reason:
            stderr().print(f"note: {reason}", style="yellow")
    ngram = None
    if data.is_dir() and split == "validation":
        try:
            ngram = measure_baseline(data, tokenizer, max_tokens)
        except UserError as reason:  # damaged or missing training documents
            stderr().print(f"note: no n-gram for comparison: {reason}", style="yellow")
    whole = DocumentsReport(**vars(report), memory=effect, beside=compared, ngram=ngram)
    if as_json:
        print_json(asdict(whole))
    else:
        _print(whole)
    if checkpoint != model:
        name = documents_name(model, data, split, documents, max_tokens, memory, beside)
        save_evaluation(model, name, checkpoint, dtype, adapter, whole)


def _open(data: Path, split: str, tokenizer: "Tokenizer", model: Path, max_tokens: int | None) -> "Documents":
    from rmkv_cli.data.documents import Documents

    if not data.is_dir():
        return Documents.from_files([data], tokenizer, max_tokens)
    documents = Documents.open(data, split)
    if documents.tokenizer_hash != tokenizer.hash:
        raise UserError(
            f"{data}: was made with a different tokenizer than that of {model} ({documents.tokenizer_hash[:12]}, not "
            f"{tokenizer.hash[:12]}); make the mix with {model}'s tokenizer.json"
        )
    return documents


def _print(report: "DocumentsReport") -> None:
    screen = console()
    scores = table("", "documents", "tokens", "loss", "perplexity", "bits per byte")
    for name, score in report.by_source.items():
        scores.add_row(name, *_cells(score))
    if len(report.by_source) != 1:
        scores.add_section()
        scores.add_row("all", *_cells(report))
    if report.ngram:
        name = f"order-{report.ngram.order} byte n-gram"
        scores.add_row(name, "", "", "", "", f"{report.ngram.bits_per_byte:.4f}")
    screen.print(scores)
    if report.tokens != report.available_tokens:
        cut = f", {report.cut:,} of them cut" if report.cut else ""
        of = "" if report.available_tokens is None else f" of {report.available_tokens:,}"
        screen.print(
            f"Read: {report.tokens:,}{of} {'token' if report.available_tokens == 1 else 'tokens'}, "
            f"{report.documents:,} of {plural(report.available_documents, 'document')}{cut}."
        )
    long = report.long_documents
    within = {part.first: f"{part.loss:.4f}" for part in long.by_position} if long else {}
    positions = table("position in document", "tokens", "loss", *(["within long documents"] if long else []))
    for part in report.by_position:
        shown = [f"{part.first:,} to {part.last:,}", f"{part.tokens:,}", f"{part.loss:.4f}"]
        positions.add_row(*shown, *([within.get(part.first, "")] if long else []))
    screen.print(positions)
    if long:
        screen.print(f"Long documents: the {long.documents:,} of at least {long.min_tokens:,} tokens.")
    if report.beside:
        _print_beside(report, report.beside)
    if effect := report.memory:
        memories = table("memory", "loss", "increase", "in bits per byte")
        memories.add_row("carried", f"{effect.carried:.4f}", "", "")
        for name, loss, cost, bits in (
            ("reset at every segment", effect.reset, effect.reset_cost, effect.reset_cost_bits_per_byte),
            ("another document's", effect.swapped, effect.swapped_cost, effect.swapped_cost_bits_per_byte),
        ):
            memories.add_row(name, f"{loss:.4f}", f"{cost:+.4f}", "" if bits is None else f"{bits:+.4f}")
        screen.print(memories)
        screen.print(
            f"Over {plural(effect.tokens, 'token')} after the first segment of {plural(effect.documents, 'document')}. "
            "Losses in nats."
        )


def _print_beside(report: "DocumentsReport", other: "Beside") -> None:
    """Print the results of both models; positions count each model's own tokens, in the ranges that both have."""
    compared = table("comparison", "this model", other.name)
    known = "" if report.bits_per_byte is None else f"{report.bits_per_byte:.4f}"
    compared.add_row("bits per byte", known, f"{other.bits_per_byte:.4f}")
    compared.add_row("tokens", f"{report.tokens:,}", f"{other.tokens:,}")
    compared.add_row("loss", f"{report.loss:.4f}", f"{other.loss:.4f}")
    losses = {part.first: part.loss for part in report.by_position}
    for part in other.by_position:
        if part.first in losses:
            compared.add_row(f"loss from position {part.first:,}", f"{losses[part.first]:.4f}", f"{part.loss:.4f}")
    both = other.own, other.reading
    compared.add_row("parameters", *(f"{each.parameters:,}" for each in both))
    compared.add_row("tokens per second", *(f"{each.tokens_per_second:,.0f}" for each in both))
    compared.add_row("largest state, or cache", *(size(each.carried_bytes) for each in both))
    compared.add_row("… after N tokens", *(f"{each.carried_tokens:,}" for each in both))
    screen = console()
    screen.print(compared)
    if other.cut:
        cut = plural(other.cut, "document")
        screen.print(f"{cut} exceeded the maximum length of {other.name}, which read only the beginning.")


def _cells(score: "Score") -> list[str]:
    bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    figures = [f"{score.loss:.4f}", f"{score.perplexity:,.2f}", bits]
    return [f"{score.documents:,}", f"{score.tokens:,}", *figures]
