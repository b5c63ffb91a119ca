"""Show whether pairs that a model writes about documents teach it to answer questions about documents it never saw.

python benchmarks/synthetic.py run
python benchmarks/synthetic.py table

A document names the people of a village, and stories about others follow; a question asks for one of the names. A model
of 0.1M parameters learns such documents, a few of which end with questions and answers. It then writes questions and
answers about many new documents (`rmkv data generate`), and the generator of the documents verifies them. From this
model, each row of the table trains further with equal tokens: half of them as before, the other half the new documents
alone, with all written pairs, or with those that are right. Each result answers questions about held-out documents at
temperature 0. Results in synthetic/results.jsonl are not computed again, and a stopped run resumes. Runs are stored in
`runs/synthetic`. On one free core, everything takes half an hour.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from reinforce import rows_table, settings, trained
from tuning import rmkv

from rmkv_cli.config import DataRecipe, MixConfig, dump_toml
from rmkv_cli.data.stories import village

RESULTS = Path(__file__).parent / "synthetic" / "results.jsonl"
WORK = Path("runs/synthetic")
TOKENIZER = WORK / "tokenizer.json"
PEOPLE, STORIES = 4, (0, 1, 2, 4)  # named in a document, and stories that follow, drawn per document
KNOWN, EXAMPLES, NEW, HELD_OUT = 2_000, 60, 4_000, 400
"""Documents of the start alone and with questions, documents to write about, and documents to ask about."""
START = {"train.tokens": 450_000, "train.decay": 0.0}
MORE = {"train.tokens": 200_000}
RECIPE: dict[str, Any] = {
    "count": NEW,
    "writer": {"model": "start", "asks_by": "text", "parallel": 64},
    "prompt": "{document}\n\nGreet",
    "slots": {"document": {"files": ["new.jsonl"], "characters": 10_000}},
    "sampling": {"temperature": 0.7, "top_p": 1.0, "max_tokens": 40},
    "filters": {"truncated": False, "near_duplicates": 0},
    "row": {"document": "{document}", "pairs": "Greet {response}"},
}
PAIR = re.compile(r"(Greet the \w+) (\w+)\.")
BEFORE = "before"
ROWS = BEFORE, "documents", "all pairs", "verified pairs"

Pair = tuple[str, str]


def documents(seed: int, count: int) -> Iterator[tuple[str, list[Pair]]]:
    """Yield documents, each with its questions and answers."""
    draw = random.Random(seed)
    for number in range(count):
        yield village(draw, PEOPLE, STORIES[number % len(STORIES)])


def with_pairs(document: str, pairs: Iterable[Pair]) -> str:
    """Return a document that ends with questions and answers."""
    return f"{document}\n\n{' '.join(f'{question} {answer}.' for question, answer in pairs)}"


def write(name: str, texts: Iterable[str]) -> None:
    """Write texts to a file of the benchmark."""
    (WORK / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def mixed(name: str, weights: dict[str, float], seed: int = 0) -> Path:
    """Return the folder of a mix of the benchmark's files; make it, and first the tokenizer, unless they exist."""
    mix, folder = WORK / f"{name}.mix.toml", WORK / "data" / f"{name}-{seed}"
    sources = [
        {"kind": "files", "name": file, "weight": weight, "files": [f"{file}.jsonl"]}
        for file, weight in weights.items()
    ]
    fields = {"seed": seed, "tokens": 1_000_000, "validation": 0.02, "sources": sources}
    mix.write_text(dump_toml(MixConfig.model_validate(fields)))
    if not TOKENIZER.exists():
        rmkv("tokenizer", "train", mix, "--vocab-size", 704, "--out", TOKENIZER)
    if not folder.exists():
        rmkv("data", "mix", mix, "--tokenizer", TOKENIZER, "--out", folder)
    return folder


def start() -> Path:
    """Return the run of the model that writes the pairs, and from which each row begins; train it unless it exists."""
    WORK.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    write("documents", (text for text, _ in documents(0, KNOWN)))
    write("examples", (with_pairs(text, pairs + draw.sample(pairs, PEOPLE)) for text, pairs in documents(1, EXAMPLES)))
    data = mixed("start", {"documents": 2, "examples": 1})
    return trained(WORK / "start", "--preset", "demo", "--data", data, *settings(START))


def write_pairs() -> dict[str, int]:
    """Have the model write pairs about new documents; write what each row trains on, and return the counts of pairs."""
    new, out = dict(documents(2, NEW)), WORK / "written.jsonl"
    write("new", new)
    if not out.exists():
        (WORK / "recipe.toml").write_text(dump_toml(DataRecipe.model_validate(RECIPE)))
        rmkv("data", "generate", WORK / "recipe.toml", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    written = {row["document"]: list(dict.fromkeys(PAIR.findall(row["pairs"]))) for row in rows}
    verified = {text: [pair for pair in pairs if pair in new[text]] for text, pairs in written.items()}
    for name, found in (("all-pairs", written), ("verified-pairs", verified)):
        write(name, (with_pairs(text, pairs) for text, pairs in found.items() if pairs))
    return {"written": sum(map(len, written.values())), "verified": sum(map(len, verified.values()))}


def measured(run: Path) -> dict[str, float]:
    """Return the share of right answers about held-out documents, by the number of stories after the names."""
    asked = [(text, *pair) for text, pairs in documents(3, HELD_OUT) for pair in pairs]
    file, out = WORK / "asked.jsonl", run / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{text}\n\n{question}"}) + "\n" for text, question, _ in asked))
    out.unlink(missing_ok=True)
    how = ["--max-tokens", 6, "--temperature", 0, "--batch-size", 64]
    rmkv("generate", "--model", run, "--file", file, "--out", out, *how)
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    right = [text.startswith(f" {answer}.") for text, (_, _, answer) in zip(texts, asked, strict=True)]
    shares = [mean(right[first : first + PEOPLE]) for first in range(0, len(right), PEOPLE)]
    return {"all": mean(shares)} | {f"stories={n}": mean(shares[i :: len(STORIES)]) for i, n in enumerate(STORIES)}


def record(row: str, seed: int) -> None:
    """Append the figures of a row's model to the results, unless they exist."""
    if any((result["row"], result["seed"]) == (row, seed) for result in results()):
        return
    run = start()
    counts = write_pairs()
    if row != BEFORE:
        name = "new" if row == "documents" else row.replace(" ", "-")
        data = mixed(name, {"documents": 2, "examples": 1, name: 3}, seed)
        options = ["--preset", "demo", "--data", data, *settings(MORE)]
        run = trained(WORK / f"{name}-{seed}", "--from", run, *options)
    figures = measured(run) | (counts if row == BEFORE else {})
    line = json.dumps({"row": row, "seed": seed} | figures)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    """Return the results as a Markdown table: mean ± standard deviation over the seeds."""
    columns = ["all", *(f"stories={n}" for n in STORIES)]
    return rows_table("", results(), ROWS, columns)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    for seed in options.seeds:
        for row in ROWS:
            if seed == 0 or row != BEFORE:
                record(row, seed)


if __name__ == "__main__":
    main()
