"""`rmkv demo`: the whole chain on the built-in corpus, each command printed as a user would type it."""

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import at_least
from rmkv_cli.errors import UserError, pip_install
from rmkv_cli.progress import stderr


def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where everything is put.")] = Path("demo"),
    tokens: Annotated[
        int | None,
        typer.Option(parser=at_least(1), metavar="N", help="Train on N tokens. [default: the preset's]"),
    ] = None,
) -> None:
    """Learn to write from nothing, from a corpus to text and a report of the run. Offline, minutes on a CPU.

    What is there already is not made again, so a demo that was stopped goes on.
    """
    if find_spec("matplotlib") is None or find_spec("plotext") is None:
        raise UserError(f"the demo draws its loss curve with matplotlib and plotext: {pip_install('plot')}")
    corpus, tokenizer, data, run = (directory / name for name in ("corpus", "tokenizer.json", "data", "run"))
    if not corpus.exists():
        _run("data", "sample", corpus)
    if not tokenizer.exists():
        _run("tokenizer", "train", corpus / "mix.toml", "--vocab-size", 4096, "--out", tokenizer)
    if not data.exists():
        _run("data", "mix", corpus / "mix.toml", "--tokenizer", tokenizer, "--out", data)
    _run("params", "--preset", "tiny")
    if (run / "config.toml").exists():
        _run("train", "--resume", "--run", run)
    else:
        shorter = ["--set", f"train.tokens={tokens}"] if tokens else []
        _run("train", "--preset", "tiny", "--data", data, "--run", run, *shorter)
    _run("eval", "--model", run, "--data", data)
    for prompt in ("This function returns", "import"):
        _run("generate", "--model", run, "--prompt", prompt, "--max-tokens", 80, "--temperature", 0.5, "--seed", 0)
    _conclude(directory, data, run)
    _run("report", run)


def _run(*words: object) -> None:
    arguments = [str(word) for word in words]
    stderr().print(f"\n$ rmkv {shlex.join(arguments)}", style="bold cyan", markup=False)
    process = subprocess.Popen([sys.executable, "-m", "rmkv_cli", *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it got the same: give it the time to save
        code = process.wait() or 130
    if code:
        raise typer.Exit(code)
    sys.stdout.flush()


def _conclude(directory: Path, data: Path, run: Path) -> None:
    """Print the loss curve, the model's bits per byte beside the n-gram's, and where everything lies."""
    from rmkv_cli.data.documents import Documents
    from rmkv_cli.evaluation import NGram, measure, texts
    from rmkv_cli.model import RMKV
    from rmkv_cli.tokenizer import Tokenizer
    from rmkv_cli.training.curve import draw_loss_curve

    held_out, tokenizer = Documents.open(data, "validation"), Tokenizer.load(data)
    baseline = NGram(texts(Documents.open(data, "train"), tokenizer)).bits_per_byte(texts(held_out, tokenizer))
    figures = {
        "rmkv": measure(RMKV.from_pretrained(run), held_out).bits_per_byte,
        "order-3 byte n-gram": baseline,
    }
    print(f"\n{draw_loss_curve(run, directory / 'loss.png')}\n")
    print("Bits per byte on held-out text (lower is better):")
    for name, bits in figures.items():
        print(f"  {name:<20} {bits:.3f}")
    (directory / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nEverything lies in {directory}/:")
    for path, what in (
        ("corpus/", "the texts and mix.toml"),
        ("tokenizer.json", "the tokenizer"),
        ("data/", "the tokens, and manifest.json"),
        ("run/", "config.toml, metrics.jsonl, checkpoints, and soon report/index.html"),
        ("loss.png", "the loss curve"),
    ):
        print(f"  {path:<16} {what}")
    print(f"\nMore text: rmkv generate --model {run} --prompt 'The class'")
