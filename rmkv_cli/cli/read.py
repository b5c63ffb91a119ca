"""`rmkv read`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.loading import Adapter, Device, Dtype, load_model
from rmkv_cli.cli.options import Json, Model, print_json
from rmkv_cli.errors import UserError
from rmkv_cli.files import require_file, require_new
from rmkv_cli.progress import plural, progress


def read(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text of any length; - reads standard input.")],
    model: Model,
    out: Annotated[Path, typer.Option(metavar="NOTES", help="Notes file to create; must not exist.")],
    state: Annotated[
        Path | None, typer.Option(metavar="NOTES", help="Continue from earlier notes, in the same document.")
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(metavar="<bf16|int8>", help="Store 16 or 8 bits per number; smaller, but not exact."),
    ] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Read a text and save the model's fixed-size state after it as notes, for `rmkv generate --state`."""
    require_new(out)
    from_stdin = file == Path("-")
    if not from_stdin:
        require_file(file)

    from rmkv_cli.generation import load_notes, read_prompt, save_notes, text_pieces
    from rmkv_cli.generation.compressed import is_compression

    if compress is not None and not is_compression(compress):
        raise UserError(f"--compress {compress}: should be bf16 or int8")
    rmkv, tokenizer = load_model(model, device, dtype, adapter)
    earlier = load_notes(state, rmkv, tokenizer) if state else None
    size = None if from_stdin else file.stat().st_size
    name = "standard input" if from_stdin else str(file)
    with (
        sys.stdin.buffer if from_stdin else file.open("rb") as stream,
        progress(f"reading {name}", size, "bytes") as advance,
    ):
        reading = read_prompt(rmkv, tokenizer, text_pieces(stream, name, advance, tokenizer.parts), earlier)
    if not reading.tokens:
        raise UserError(f"{name}: contains no text")
    save_notes(out, reading, rmkv, tokenizer, compress)
    figures = {
        "notes": str(out),
        "tokens": reading.tokens,
        "document_tokens": int(reading.state.position),
        "bytes": out.stat().st_size,
        "tokens_per_second": reading.tokens / reading.seconds,
    }
    if as_json:
        print_json(figures)
        return
    total = f" ({figures['document_tokens']:,} with the earlier notes)" if earlier else ""
    print(f"{out}: {figures['bytes']:,} bytes after {plural(reading.tokens, 'token')}{total}")
    print(f"{figures['tokens_per_second']:,.0f} tokens per second")
