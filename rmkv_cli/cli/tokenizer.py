"""`rmkv tokenizer`: train, use and inspect tokenizers."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import Json, MixName, at_least, print_json, read_mix
from rmkv_cli.config import load_config, preset_path
from rmkv_cli.errors import UserError
from rmkv_cli.files import HEAD, require_file, require_new, text_fault

app = typer.Typer(no_args_is_help=True, help="Train, use and inspect tokenizers.")
SHOWN = 2_000
"""Characters of a text whose split into tokens is shown."""

TokenizerFile = Annotated[Path, typer.Argument(metavar="TOKENIZER", help="A tokenizer.json, or a folder with one.")]
File = Annotated[Path | None, typer.Option("--file", help="Read the text from this file.")]


@app.command(epilog="Example: rmkv tokenizer train sample/mix.toml --vocab-size 4096 --out tokenizer.json")
def train(
    mix: MixName = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this preset's mix and vocabulary size.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1), metavar="N", help="Number of tokens, at least 263.", show_default="the preset's"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to create; must not exist.")] = Path("tokenizer.json"),
    max_bytes: Annotated[
        int, typer.Option(parser=at_least(1), metavar="N", help="Read at most this much text.")
    ] = 200_000_000,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on the sources of a mix, in proportion to their weights."""
    from rmkv_cli.data.vocabulary import train_on_mix

    require_new(out)
    sources, base = read_mix(mix, preset)
    if vocab_size is None:
        if preset is None:
            raise UserError("give --vocab-size N, the number of tokens, or --preset NAME, which has one")
        vocab_size = load_config(preset_path(preset)).model.vocab_size
    trained = train_on_mix(sources, base, vocab_size, max_bytes)
    trained.tokenizer.save(out)
    if as_json:
        print_json(
            {
                "tokenizer": str(out),
                "vocab_size": trained.tokenizer.vocab_size,
                "hash": trained.tokenizer.hash,
                "bytes": trained.bytes,
                "bytes_per_token": trained.bytes_per_token,
                "held_out": trained.held_out,
            }
        )
        return
    measured = "held-out text" if trained.held_out else "its training text (the mix holds out no text)"
    print(f"{out}: {trained.tokenizer.vocab_size:,} tokens from {trained.bytes:,} bytes of text")
    print(f"{trained.bytes_per_token:.3f} bytes per token on {measured}")


@app.command(epilog='Example: rmkv tokenizer encode tokenizer.json "Hello, world"')
def encode(
    tokenizer: TokenizerFile,
    text: Annotated[str | None, typer.Argument(help="The text; without it and --file, read stdin.")] = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Print the token ids of a text. Text that spells a special token is encoded as ordinary text."""
    from rmkv_cli.tokenizer import Tokenizer

    ids = Tokenizer.load(tokenizer).encode(_text(text, file))
    if as_json:
        print_json({"ids": ids})
    else:
        print(*ids)


@app.command(epilog="Example: rmkv tokenizer decode tokenizer.json 71 100 260")
def decode(
    tokenizer: TokenizerFile,
    ids: Annotated[list[int] | None, typer.Argument(help="The ids; without them, read stdin.")] = None,
    as_json: Json = False,
) -> None:
    """Print the text of token ids, byte for byte, with special tokens spelt out."""
    from rmkv_cli.tokenizer import Tokenizer

    library = Tokenizer.load(tokenizer)
    if ids is None:
        words = sys.stdin.read().split()
        try:
            ids = [int(word) for word in words]
        except ValueError:
            wrong = next((word for word in words if not word.isdecimal()), words[0][:20])  # or a huge number
            raise UserError(f"stdin: '{wrong}' is not a token id; give whole numbers separated by spaces") from None
    if as_json:
        print_json({"text": library.decode(ids)})
    else:
        sys.stdout.buffer.write(library.text_bytes(ids))
        sys.stdout.buffer.write(b"\n" * sys.stdout.isatty())


@app.command(epilog='Example: rmkv tokenizer inspect tokenizer.json --text "Split this"')
def inspect(
    tokenizer: TokenizerFile,
    file: File = None,
    text: Annotated[str | None, typer.Option("--text", help="A text to split.")] = None,
    as_json: Json = False,
) -> None:
    """Show a tokenizer's size and hash, its bytes per token on a text, and the text's tokens."""
    from rmkv_cli.tokenizer import Tokenizer

    library = Tokenizer.load(tokenizer)
    figures: dict[str, object] = {"vocab_size": library.vocab_size, "hash": library.hash}
    split: list[str] = []
    if text is not None or file is not None:
        content = _text(text, file)
        ids = library.encode(content)
        size = len(content.encode())
        figures |= {"bytes": size, "tokens": len(ids), "bytes_per_token": size / len(ids) if ids else None}
        split = [library.token_bytes(i).decode("utf-8", "backslashreplace") for i in library.encode(content[:SHOWN])]
    if as_json:
        print_json(figures | ({"split": split} if split else {}))
        return
    for name, figure in figures.items():
        shown = f"{figure:,}" if isinstance(figure, int) else f"{figure:.3f}" if isinstance(figure, float) else figure
        print(f"{name.replace('_', ' '):<16} {shown}")
    _print_split(split)


def _print_split(split: list[str]) -> None:
    """Print tokens, in alternating colours on a terminal and separated by bars elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        print("|".join(split))
        return
    styles = ("black on bright_cyan", "black on bright_yellow")
    console.print(Text.assemble(*((token, styles[i % 2]) for i, token in enumerate(split))))


def _text(text: str | None, file: Path | None) -> str:
    """Return the text of the argument, the file or stdin, with newlines unchanged."""
    if text is not None and file is not None:
        raise UserError("give the text either as an argument or with --file, not both")
    if text is not None:
        return text
    if file is not None:
        require_file(file)
    data = file.read_bytes() if file is not None else sys.stdin.buffer.read()
    if what := text_fault(data[:HEAD]):
        raise UserError(f"{file or 'stdin'}: {what}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file or 'stdin'}: is not valid UTF-8 at byte {error.start}") from None
