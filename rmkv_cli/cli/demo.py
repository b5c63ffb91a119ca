"""`rmkv demo`: from nothing to a model that remembers, each command printed as a user would type it."""

import json
import os
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

MEMORY = "village.rmkv"
SHOWN = 4  # questions, the first of the file, whose answers are printed


def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where everything is put.")] = Path("demo"),
    tokens: Annotated[
        int | None,
        typer.Option(parser=at_least(1), metavar="N", help="Train on N tokens. [default: the preset's]"),
    ] = None,
) -> None:
    """Train a small model on stories, then ask it about the beginning of a long text. Offline, minutes on a CPU.

    Existing files are not made again, so a stopped demo resumes.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f"the demo ends with a report, whose pictures need matplotlib: {pip_install('plot')}")
    corpus, tokenizer, data, run = (directory / name for name in ("corpus", "tokenizer.json", "data", "run"))
    text, memory = corpus / "village.txt", directory / MEMORY
    answers = [directory / "answers.jsonl", directory / "answers-reset.jsonl"]
    if not corpus.exists():
        _run("data", "sample", corpus, "--stories")
    if not tokenizer.exists():
        _run("tokenizer", "train", corpus / "mix.toml", "--vocab-size", 704, "--out", tokenizer)
    if not data.exists():
        _run("data", "mix", corpus / "mix.toml", "--tokenizer", tokenizer, "--out", data)
    if (run / "config.toml").exists():
        _run("train", "--resume", "--run", run)
    else:
        shorter = ["--set", f"train.tokens={tokens}"] if tokens else []
        _run("train", "--preset", "demo", "--data", data, "--run", run, *shorter)
    _run("eval", "--model", run, "--data", data)
    _run("report", run)
    if not memory.exists():
        _run("read", text, "--model", run, "--out", memory)
    for out, state in zip(answers, (["--state", memory], []), strict=True):
        if not out.exists():
            ask = "--file", corpus / "questions.jsonl", "--temperature", 0, "--max-tokens", 4, "--stop", "."
            _run("generate", "--model", run, *state, *ask, "--out", out)
    write = "--temperature", 0.5, "--max-tokens", 120, "--num-samples", 2, "--seed", 0
    _run("generate", "--model", run, "--prompt", "One morning", *write)
    _conclude(directory, run, text, answers)


def _run(*words: object) -> None:
    arguments = [str(word) for word in words]
    stderr().print(f"\n$ rmkv {shlex.join(arguments)}", style="bold cyan", markup=False)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # more threads slow down a model of this size
    process = subprocess.Popen([sys.executable, "-m", "rmkv_cli", *arguments], env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the process received it as well: give it time to save
        code = process.wait() or 130
    if code:
        raise typer.Exit(code)
    sys.stdout.flush()


def _conclude(directory: Path, run: Path, text: Path, answers: list[Path]) -> None:
    """Print answers with memory and without, bits per byte beside the n-gram's, and where the report is."""
    from rmkv_cli.evaluation.kept import DocumentsReport, kept_evaluations
    from rmkv_cli.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(run)
    stories = len(tokenizer.encode(text.read_text(encoding="utf-8").partition("\n")[2]))
    remembered, reset = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in answers
    )
    print(
        f"\n{text}: the first sentence names {len(remembered)} people, and stories of {stories:,} tokens follow. Then:"
    )
    print(f"  {'':<24}{'with its memory':<30}with the memory reset")
    for with_memory, without in list(zip(remembered, reset, strict=True))[:SHOWN]:
        print(f"  {with_memory['prompt']:<24}{_graded(with_memory):<30}{_graded(without)}")
    right, guessed = (sum(map(_is_right, lines)) for lines in (remembered, reset))
    print(f"  {f'right, of all {len(remembered)}':<24}{right:<30}{guessed}")

    report = kept_evaluations(run)["validation"].report
    assert isinstance(report, DocumentsReport)
    assert report.ngram
    print("\nBits per byte on held-out texts (lower is better):")
    print(f"  {report.bits_per_byte:.3f} rmkv, {report.ngram.bits_per_byte:.3f} order-3 byte n-gram")
    figures = {"rmkv": report.bits_per_byte, "order-3 byte n-gram": report.ngram.bits_per_byte}
    figures |= {"questions": len(remembered), "right": right, "right with the memory reset": guessed}
    (directory / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nThe run as a page: {run / 'report' / 'index.html'}")
    ask = shlex.join(["--model", str(run), "--state", str(directory / MEMORY), "--prompt", remembered[-1]["prompt"]])
    print(f"Ask it yourself: rmkv generate {ask} --stop .")


def _graded(line: dict[str, str]) -> str:
    return f"{' '.join(line['text'].split())} ({'right' if _is_right(line) else 'wrong'})"


def _is_right(line: dict[str, str]) -> bool:
    return line["text"].strip() == line["answer"]
