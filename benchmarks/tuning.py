"""Measure the gains and costs of fine-tuning: all weights, LoRA at three ranks, and only the initial memory.

python benchmarks/tuning.py run
python benchmarks/tuning.py run --rows "all weights, rate 1e-3" --seeds 0
python benchmarks/tuning.py table

A model of the preset `tiny` learns prose and code, and is then fine-tuned on worked problems of three kinds, with only
the answers supervised. It answers unseen problems at temperature 0; an answer is correct if it equals the expected
text. Results in tuning/results.jsonl are not computed again, and a stopped run resumes. Runs are stored in
`runs/tuning`. A row takes minutes per seed on one core; with OMP_NUM_THREADS=1 two can run at the same time.
"""

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

from memory import spread

from rmkv_cli.data.problems import problems
from rmkv_cli.training.metrics import read_metrics

HERE = Path(__file__).parent / "tuning"
RESULTS = HERE / "results.jsonl"
WORK = Path("runs/tuning")
BASE, DATA, TEXT, TOKENIZER = WORK / "base", WORK / "problems", WORK / "text", WORK / "tokenizer.json"
PROBLEMS, ASKED = 6_000, 400
KINDS = ("How often is the letter", "Sort from", "Which is larger")
"""Beginnings of the prompts: kinds of problems that a model of this size can learn from a few thousand examples."""

BEFORE = "before"
LORA = "train.trainable=adapters"
ROWS: dict[str, list[str]] = {BEFORE: []}
ROWS |= {f"all weights, rate {rate}": [f"train.learning_rate={rate}"] for rate in ("3e-4", "1e-3", "3e-3")}
ROWS |= {
    f"all weights, Muon, rate {rate}": ["train.optimizer=muon", f"train.learning_rate={rate}"]
    for rate in ("1e-3", "3e-3")
}
ROWS["all weights, rate 1e-3, constant then decay"] = [
    "train.learning_rate=1e-3",
    "train.schedule=wsd",
    "train.decay=0.3",
]
ROWS |= {
    f"LoRA, rank {rank}, rate {rate}": [
        LORA,
        f"train.adapter.rank={rank}",
        f"train.adapter.alpha={2 * rank}",
        f"train.learning_rate={rate}",
    ]
    for rank in (4, 16, 64)
    for rate in ("1e-3", "3e-3", "1e-2")
}
ROWS |= {
    f"memory start, rate {rate}": ['train.trainable=["memory start"]', f"train.learning_rate={rate}"]
    for rate in ("1e-2", "3e-2", "1e-1")
}


def rmkv(*words: object) -> str:
    """Run an rmkv command, say which, and return what it prints."""
    print("rmkv", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "rmkv_cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare() -> None:
    """Make corpus, tokenizer, data and the model that is tuned, unless they are there."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "corpus").exists():
        rmkv("data", "sample", WORK / "corpus")
    lines = list(islice((line for line in problems(seed=1) if line["prompt"].startswith(KINDS)), PROBLEMS + ASKED))
    (WORK / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:PROBLEMS]))
    asked = [
        {"messages": [{"role": "user", "content": line["prompt"]}], "response": line["response"]}
        for line in lines[PROBLEMS:]
    ]
    (WORK / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    for mix in ("text", "problems"):
        (WORK / f"{mix}.mix.toml").write_text((HERE / f"{mix}.mix.toml").read_text())
    if not TOKENIZER.exists():
        rmkv("tokenizer", "train", WORK / "corpus" / "mix.toml", "--vocab-size", 4096, "--out", TOKENIZER)
    for folder in (TEXT, DATA):
        if not folder.exists():
            rmkv("data", "mix", WORK / f"{folder.name}.mix.toml", "--tokenizer", TOKENIZER, "--out", folder)
    if (BASE / "config.toml").exists():
        rmkv("train", "--resume", "--run", BASE)
    else:
        rmkv("train", "--preset", "tiny", "--data", TEXT, "--run", BASE)


def run(row: str, seed: int) -> dict[str, Any]:
    """Tune with a row's settings and a seed; return the figures."""
    if row == BEFORE:
        return {"row": row, "seed": seed} | measured(WORK / BEFORE, ["--model", BASE])
    folder = WORK / f"{row.replace(' ', '-').replace(',', '')}-{seed}"
    if (folder / "config.toml").exists():
        rmkv("train", "--resume", "--run", folder)
    else:
        changes = [word for setting in [*ROWS[row], f"train.seed={seed}"] for word in ("--set", setting)]
        rmkv(
            *("train", "--from", BASE, "--config", HERE / "tuning.toml", "--data", DATA, "--run", folder),
            *changes,
        )
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "tokens_per_second" in record]
    report = json.loads(rmkv("params", "--config", folder / "config.toml", "--json"))["training_bytes"]
    figures = {
        "row": row,
        "seed": seed,
        "tokens_per_second": median(record["tokens_per_second"] for record in records),
        "optimizer_bytes": report["optimizer"],
        "training_bytes": report["total"],
        "saved_bytes": saved_bytes(folder),
    }
    return figures | measured(folder, ["--model", folder])


def saved_bytes(run: Path) -> int:
    """Return the size of the weights that a run saves, in addition to its starting model or in place of it."""
    files = ("adapter_model.safetensors", "memory.safetensors", "model.safetensors")
    return next((run / "latest" / name).stat().st_size for name in files if (run / "latest" / name).exists())


def measured(folder: Path, model: list[object]) -> dict[str, Any]:
    """Return the share of problems answered right, bits per byte of the pretraining's text, and what is saved."""
    folder.mkdir(exist_ok=True)
    answers = folder / "answers.jsonl"
    answers.unlink(missing_ok=True)
    how = ["--max-tokens", 160, "--temperature", 0, "--batch-size", 32]
    rmkv("generate", *model, "--file", WORK / "asked.jsonl", "--out", answers, *how)
    right = [
        line["text"].rpartition("</think>")[2].strip() == line["response"].rpartition("</think>")[2]
        for line in map(json.loads, answers.read_text().splitlines())
    ]
    bits = json.loads(rmkv("eval", *model, "--data", TEXT, "--no-memory", "--json"))["bits_per_byte"]
    return {"accuracy": mean(right), "bits_per_byte": bits}


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    """Return the results as a Markdown table: mean ± standard deviation over the seeds."""
    kept = [result for row in ROWS for result in results() if result["row"] == row]
    # Tokens per second are left out, because they depend on the machine's other load.
    left_out = "row", "seed", "tokens_per_second"
    keys = [key for key in max(kept, key=len, default={}) if key not in left_out]
    lines = [f"| | seeds | {' | '.join(keys)} |", f"| --- | --- | {' | '.join(['---'] * len(keys))} |"]
    for row in dict.fromkeys(result["row"] for result in kept):
        runs = [result for result in kept if result["row"] == row]
        cells = [spread([run[key] for run in runs]) if key in runs[0] else "" for key in keys]
        lines.append(f"| {row} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    prepare()
    for seed in options.seeds:
        for row in options.rows:
            if not any((result["row"], result["seed"]) == (row, seed) for result in results()):
                line = json.dumps(run(row, seed))
                with RESULTS.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
