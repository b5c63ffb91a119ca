"""`rmkv data`: create the sample corpus, generate data, mix sources, inspect mixes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmkv_cli.cli.generate_data import generate_data
from rmkv_cli.cli.options import Json, MixName, TokenizerFile, at_least, print_json, read_mix
from rmkv_cli.progress import plural, stderr

if TYPE_CHECKING:
    from rmkv_cli.data.manifest import SourceReport
    from rmkv_cli.data.survey import SourceSurvey

HELD_OUT = ("held out: documents", "tokens")
app = typer.Typer(no_args_is_help=True, help="Create the sample corpus, generate data, mix sources and inspect mixes.")
app.command("generate", epilog="Example: rmkv data generate stories --out stories.jsonl --set writer.model=runs/tiny")(
    generate_data
)


@app.command(epilog="Example: rmkv data sample sample")
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create; must not exist.")],
    stories: Annotated[
        bool, typer.Option("--stories", help="Make small stories, and a long text with questions about its beginning.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Create a corpus of prose, code and worked problems from the local Python installation, without any download.

    The folder also contains a mix.toml.
    """
    from rmkv_cli.data.sample import make_sample
    from rmkv_cli.data.stories import make_stories

    files = make_stories(folder) if stories else make_sample(folder)
    if as_json:
        print_json(files)
        return
    for name, size in files.items():
        print(f"{folder / name}: {size:,} bytes")


@app.command("mix", epilog="Example: rmkv data mix sample/mix.toml --tokenizer tokenizer.json --out data --workers 4")
def mix_command(
    mix: MixName = None,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Use the mix of this preset.")] = None,
    tokenizer: TokenizerFile = Path("tokenizer.json"),
    out: Annotated[Path, typer.Option(help="Folder to create; must not exist.")] = Path("data"),
    tokens: Annotated[
        int | None,
        typer.Option(parser=at_least(1), metavar="N", help="Training tokens to write, such as 5M."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1, show_default="one per core", help="Tokenizing processes; their number does not change the result."
        ),
    ] = os.cpu_count() or 1,
    as_json: Json = False,
) -> None:
    """Tokenize the sources of a mix and write their documents in the ratio of the weights, by tokens."""
    from rmkv_cli.data.mix import (
        prepare,
        warn_of_sources_without_held_out,
        warn_of_sources_without_supervision,
    )
    from rmkv_cli.tokenizer import Tokenizer

    sources, base = read_mix(mix, preset, tokens)
    manifest = prepare(sources, base, Tokenizer.load(tokenizer), out, workers)
    if as_json:
        print_json(manifest.model_dump())
        return
    rows = [
        (
            *(source.name, f"{source.weight:g}", f"{source.wanted:.2%}", f"{source.achieved:.2%}"),
            *(f"{source.documents:,}", f"{source.tokens:,}", f"{source.bytes:,}"),
            *(f"{source.bytes / max(1, source.tokens):.3f}", *_held_out(source)),
            *(str(source.epochs), f"{source.skipped:,}"),
        )
        for source in manifest.sources
    ]
    titles = ("source", "weight", "wanted", "achieved", "documents", "tokens", "bytes", "bytes/token")
    _print_table((*titles, *HELD_OUT, "epochs", "skipped"), rows)
    for name, split in manifest.splits.items():
        print(f"{name}: {plural(split.documents, 'document')}, {plural(split.tokens, 'token')}, {split.bytes:,} bytes")
    supervised = sum(source.supervised_tokens or 0 for source in manifest.sources)
    if supervised < (tokens := manifest.splits["train"].tokens):
        print(f"supervised: {plural(supervised, 'token')} of the {tokens:,} for training")
    if manifest.ended_by:
        stderr().print(
            f"Mixing stopped when source '{manifest.ended_by}' was exhausted; set `tokens = N` in the mix to repeat "
            "exhausted sources instead."
        )
    warn_of_sources_without_supervision(manifest)
    warn_of_sources_without_held_out(manifest)
    if not sources.validation:
        stderr().print(
            "No document is held out; set `validation` in the mix to the share of documents to hold out.",
            style="yellow",
        )
    _print_skipped(manifest.sources)


@app.command(epilog="Example: rmkv data inspect data")
def inspect(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DIR|SHARD|MIX",
            help="A prepared mix or one of its shards, a mix.toml, or the name of a shipped mix.",
        ),
    ],
    samples: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="Documents to show from each source.")
    ] = 2,
    documents: Annotated[
        int,
        typer.Option(
            parser=at_least(1), metavar="N", help="Documents to read from each source if the mix is not prepared."
        ),
    ] = 1_000,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Tokenize the beginning of a mix that is not prepared, to report tokens as well as bytes."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            metavar="N",
            help="For a prepared mix: show its first N tokens, with supervised tokens in colour (in a pipe: ⟦so⟧). "
            "With --tokenizer: mix the first N tokens (default: 1M).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a mix's ratios, document lengths and sample documents, with special tokens spelt out."""
    import dataclasses

    from rmkv_cli.data.survey import survey_folder, survey_mix, survey_start
    from rmkv_cli.tokenizer import Tokenizer

    prepared = Path(place).is_dir() or place.endswith(".arrow")
    if prepared and tokens is not None:
        _show_supervised(Path(place), tokens, as_json)
        return
    if prepared:
        surveys = survey_folder(Path(place), samples)
    else:
        tokens = tokens or 1_000_000
        mix, base = read_mix(place, None, None if tokenizer is None else tokens)
        if tokenizer is not None:
            surveys = survey_start(mix, base, samples, Tokenizer.load(tokenizer), tokens)
        else:
            surveys = survey_mix(mix, base, samples, documents)
    if as_json:
        print_json([dataclasses.asdict(s) | {"samples": ["".join(text) for text in s.samples]} for s in surveys])
        return
    rows = [
        (
            *(s.name, f"{s.wanted:.2%}", "-" if s.achieved is None else f"{s.achieved:.2%}", f"{s.documents:,}"),
            *("-" if s.tokens is None else f"{s.tokens:,}", f"{s.bytes:,}"),
            *(f"{s.bytes / s.tokens:.3f}" if s.tokens else "-", *_held_out(s)),
            *(f"{s.shortest:,}", f"{s.median:,.0f}", f"{s.longest:,}", f"{s.skipped:,}"),
        )
        for s in surveys
    ]
    unit = "bytes" if surveys[0].tokens is None else "tokens"
    lengths = (f"shortest ({unit})", "median", "longest", "skipped")
    _print_table(
        ("source", "wanted", "achieved", "documents", "tokens", "bytes", "bytes/token", *HELD_OUT, *lengths), rows
    )
    edges = sorted({edge for survey in surveys for edge in survey.histogram})
    shares = [(s.name, *(f"{s.histogram.get(edge, 0) / max(1, s.documents):.1%}" for edge in edges)) for s in surveys]
    print(f"\nShare of documents by length: from N to 2N {unit}")
    _print_table(("source", *(f"{edge:,}" for edge in edges)), shares)
    for survey in surveys:
        for pieces in survey.samples:
            _print_sample(survey.name, pieces)
    _print_skipped(surveys)


def _show_supervised(place: Path, tokens: int, as_json: bool) -> None:
    """Print the first tokens of a prepared mix's documents, and mark the supervised ones."""
    import dataclasses

    from rmkv_cli.data.supervised import supervised_documents
    from rmkv_cli.tokenizer import Tokenizer

    documents = supervised_documents(place, tokens)
    if as_json:
        print_json([dataclasses.asdict(document) for document in documents])
        return
    from rich.console import Console
    from rich.text import Text

    from rmkv_cli.markdown import CONTROLS

    tokenizer = Tokenizer.load(place if place.is_dir() else place.parent)
    for each in documents:
        title = (
            f"[{each.source}] document {each.document}: {each.supervised_tokens:,} of {each.length:,} tokens supervised"
        )
        runs = [(supervised, "".join(pieces)) for supervised, pieces in each.runs(tokenizer)]
        cut = "" if each.end_supervised is not None else "…"
        if sys.stdout.isatty():
            parts = [(text.translate(CONTROLS), "bold green" if supervised else "") for supervised, text in runs]
            Console(highlight=False).print(Text.assemble((f"{title}\n", "bold cyan"), *parts, f"{cut}\n"))
        else:
            print(f"{title}\n" + "".join(f"⟦{text}⟧" if supervised else text for supervised, text in runs) + f"{cut}\n")


def _held_out(source: "SourceReport | SourceSurvey") -> tuple[str, str]:
    """Return the table cells of the columns `HELD_OUT`."""
    figures = source.held_out_documents, source.held_out_tokens
    return tuple("-" if figure is None else f"{figure:,}" for figure in figures)  # type: ignore[return-value]


def _print_skipped(sources: "Sequence[SourceReport | SourceSurvey]") -> None:
    """Print the number of each source's unreadable records, and the first error."""
    for source in sources:
        if source.skipped:
            records = plural(source.skipped, "record")
            stderr().print(
                f"source '{source.name}': {records} skipped; the first: {source.first_error}", style="yellow"
            )


def _print_sample(source: str, pieces: Sequence[str]) -> None:
    """Print a sample document; on a terminal, its special tokens are in colour."""
    from rich.console import Console
    from rich.text import Text

    from rmkv_cli.markdown import CONTROLS
    from rmkv_cli.tokenizer import Token

    if not sys.stdout.isatty():
        print(f"\n[{source}] {''.join(pieces)}")
        return
    # Replace control characters: untrusted text must not control the terminal.
    parts = [(p.translate(CONTROLS), "bold magenta" if isinstance(p, Token) else "") for p in pieces]
    Console(highlight=False).print(Text.assemble("\n", (f"[{source}] ", "bold cyan"), *parts))


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their titles: names aligned left, numbers aligned right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        name, *figures = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *figures]))
