"""Extend a trained model to long rows, and measure what it remembers from 1,000 to a million tokens.

python benchmarks/curves.py prepare                       # the tokenizer and the packages are those of curves.py
python benchmarks/long.py run --model RUN                 # a run of curves.py, as runs/curves/RMKV-1.5M-16M-0.003-0
python benchmarks/long.py table

The model reads 16M more tokens: in rows that grow from 2,048 to 131,072 tokens, or, as a control, in rows of 2,048.
States are carried along the rows, as always. Results in long/results.jsonl are not computed again, and a stopped run
resumes. Runs are stored in `runs/long`. It needs the extra `bench`, and apt-get.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bs4 import XMLParsedAsHTMLWarning
from curves import PROSE, TOKENIZER, commit, prose, write
from quality import rmkv

from rmkv_cli.config import TaskSource, load_mix
from rmkv_cli.data.documents import Documents
from rmkv_cli.evaluation import measure, task_accuracy
from rmkv_cli.files import atomic_file
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.tokenizer import Tokenizer

HERE = Path(__file__).parent / "long"
CONFIG, RESULTS = HERE / "long.toml", HERE / "results.jsonl"
WORK = Path("runs/long")
DATA, HELD_OUT = WORK / "data", WORK / "held-out"

BOOK = 600_000  # characters, more than 131,072 tokens
ROWS = {
    "before": None,
    "rows of 2,048 tokens": ["train.segments_max=32"],
    "rows of 2,048 to 131,072 tokens": [],
}
DISTANCES = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)  # tokens
READ = 1_048_576  # tokens per cell of a task, at least 4 documents and at most 32


def prepare() -> None:
    """Join the packages' pages to books and mix the data, unless they exist."""
    WORK.mkdir(parents=True, exist_ok=True)
    for split, packages in PROSE.items():
        file = WORK / f"books-{split}.jsonl"
        if not file.exists():
            with atomic_file(file) as aside:
                write(aside, (book for package in packages for book in books(package)))
    for name, out in (("train", DATA), ("held-out", HELD_OUT)):
        if not out.exists():
            mix = WORK / f"{name}.mix.toml"
            mix.write_text((HERE / mix.name).read_text())
            rmkv("data", "mix", str(mix), "--tokenizer", str(TOKENIZER), "--out", str(out))


def books(package: str) -> Iterator[str]:
    """Yield a package's pages, joined in the order of their paths and cut into books; a shorter rest is left out."""
    text = "\n\n".join(dict.fromkeys(prose([package])))
    yield from (text[start : start + BOOK] for start in range(0, len(text) - BOOK + 1, BOOK))


def train(row: str, model: Path) -> Path:
    """Return the model of a row; train it, or resume its training, unless it is complete."""
    settings = ROWS[row]
    if settings is None:
        return model
    folder = WORK / f"{model.name}-{'-'.join(row.replace(',', '').split())}"
    if (folder / "config.toml").exists():
        rmkv("train", "--run", str(folder), "--resume")
    else:
        changes = [word for setting in settings for word in ("--set", setting)]
        start = ("--from", str(find_model(model)), "--config", str(CONFIG))
        rmkv("train", *start, "--data", str(DATA), "--run", str(folder), *changes)
    return folder


def figures(folder: Path) -> dict[str, Any]:
    """Return a model's loss by position in held-out books, and its accuracy in tasks by distance in tokens."""
    model, tokenizer = RMKV.from_pretrained(folder), Tokenizer.load(TOKENIZER)
    documents = Documents.open(HELD_OUT, "train")
    report = measure(model, documents, tokenizer=tokenizer)
    assert report.long_documents is not None
    by_position = {bucket.first: bucket.loss for bucket in report.long_documents.by_position}
    text = [documents[i] for i in range(len(documents))]
    tasks = [source for source in load_mix(WORK / "train.mix.toml").sources if isinstance(source, TaskSource)]
    S = model.config.segment_length
    accuracy: dict[str, dict[int, float]] = {}
    for task in tasks:
        question = {
            "pairs": [8],
            "depth": [0.0],
            "facts": [1],
            "along": False,
            "queries": 1 if task.kind == "facts" else 4,
        }
        for distance in DISTANCES:
            change = {key: value for key, value in question.items() if hasattr(task, key)} | {
                "segments": [distance // S]
            }
            asked = type(task).model_validate(task.model_dump() | change)
            count = max(4, min(32, READ // distance))
            found = task_accuracy(model, asked, tokenizer, text, examples=count)
            accuracy.setdefault(task.kind, {})[distance] = found.cells[0].accuracy
            print(f"{task.kind} over {distance:,} tokens: {found.cells[0].accuracy:.3f}", file=sys.stderr, flush=True)
    return {"loss": by_position, "accuracy": accuracy, "state_bytes": model.initial_state(1).size()}


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> Iterator[str]:
    """Yield Markdown tables: the loss in nats per token by position, and each task's accuracy by distance."""
    found = results()
    parts = {"loss from": [r["loss"] for r in found]}
    for kind in found[0]["accuracy"]:
        parts[f"{kind} over"] = [r["accuracy"][kind] for r in found]
    for name, cells in parts.items():
        yield "| " + " | ".join([name, *(f"{int(at):,}" for at in cells[0])]) + " |"
        yield "| " + " | ".join(["---"] * (1 + len(cells[0]))) + " |"
        for result, values in zip(found, cells, strict=True):
            yield (
                "| "
                + " | ".join([f"{result['model']}, {result['row']}", *(f"{x:.3f}" for x in values.values())])
                + " |"
            )
        yield ""


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run", "table"])
    parser.add_argument("--model", type=Path, help="trained run to extend")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    if options.what == "table":
        print(*table(), sep="\n")
        return
    warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
    prepare()
    if options.what == "prepare":
        return
    if options.model is None:
        parser.error("run needs --model")
    for row in options.rows:
        key = {"model": options.model.name, "row": row}
        if not any(key.items() <= result.items() for result in results()):
            result = key | figures(train(row, options.model)) | {"commit": commit()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
