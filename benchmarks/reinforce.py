"""Show what models that solve a task now and then learn from their own answers, and what they forget.

python benchmarks/reinforce.py run
python benchmarks/reinforce.py run --tasks recall --seeds 0
python benchmarks/reinforce.py table

Two models of 0.1M parameters learn prose and a task from worked examples, until they answer correctly now and then: to
recall values across up to one segment of noise, and to spell made-up words. Each row of the table trains them further:
by reinforcement, alone or with a KL divergence from the tuned model; on spelling also from worked examples, with or
without the reinforced model as teacher, and by on-policy distillation from that teacher, all three with equal tokens.
Each model answers fixed exercises of every level at temperature 1, and reads held-out documents of the data it was
tuned on. Results in reinforce/results.jsonl are not computed again, and a stopped run resumes. Runs are stored in
`runs/reinforce`. On one free core, a row takes one to eight minutes per seed.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from memory import spread
from tuning import rmkv

from rmkv_cli.config import MixConfig, RolloutsConfig, dump_toml
from rmkv_cli.data.exercises import Exercise, levels, make_exercise
from rmkv_cli.data.exercises.words import spelling
from rmkv_cli.generation import Decoder, SamplingConfig, Text
from rmkv_cli.generation.generate import together
from rmkv_cli.generation.prompt import read_tokens
from rmkv_cli.model import RMKV, find_model, inference
from rmkv_cli.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "reinforce" / "results.jsonl"
WORK = Path("runs/reinforce")
TOKENIZER = WORK / "tokenizer.json"
EXERCISES, SAMPLES, LANES = 64, 4, 64  # exercises of each level, answers to each, and answers generated at once
SEED = 1_000_000  # of these exercises; training uses other seeds
MODEL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "memory.slots": 4}


class Task(NamedTuple):
    """How a model is tuned to solve a task now and then, and what reinforcement trains on."""

    mix: dict[str, Any]
    """Mix of the data to tune on."""
    tuning: dict[str, Any]
    """Settings of the tuning."""
    exercises: dict[str, Any]
    """Exercises that reinforcement draws."""
    reinforcement: dict[str, Any]
    """Settings of the reinforcement."""
    measured: dict[str, Any]
    """Exercises that are answered before and after."""


RECALL = {"kind": "recall", "pairs": [4], "segment_length": 16, "keys": 32, "values": 32, "noise": 32}
SPELLED = {"kind": "files", "name": "spelling", "weight": 1, "files": ["spelling.jsonl"], "format": "prompt_response"}
PROSE = {"kind": "files", "name": "prose", "weight": 1, "files": ["corpus/prose.jsonl"]}
TUNING = {"train.batch_size": 16, "train.micro_batch_size": 16, "train.decay": 0.0, "train.replay": False}
REINFORCEMENT = {
    "train.optimizer": "muon",
    "train.learning_rate": 4e-3,
    "train.precision": "fp32",
    "train.micro_batch_size": 64,
    "train.batch_size": 128,
    "train.replay": False,
    "train.rollouts.samples": 4,
    "train.log_every": 1,
}
SHORT = {
    "train.learning_rate": 1e-3,
    "train.batch_size": 512,
    "train.rollouts.samples": 8,
    "train.rollouts.max_tokens": 32,
}
"""Changes for short prompts, since many more answers fit into a step."""
TASKS = {
    "recall": Task(
        {
            "tokens": 1_000_000,
            "validation": 0.02,
            "sources": [RECALL | {"weight": 1, "segments": [0, 1]}, PROSE | {"weight": 4}],
        },
        TUNING | {"train.tokens": 60_000, "model.segment_length": 16, "model.lookback": 8},
        RECALL | {"segments": [2, 3]},
        REINFORCEMENT | {"train.tokens": 450_000},
        RECALL | {"segments": [1, 3, 7, 15]},
    ),
    "spelling": Task(
        {"validation": 0.02, "supervise": "answers", "sources": [SPELLED, PROSE]},
        TUNING | {"train.tokens": 360_000},
        {"kind": "spelling", "letters": [2, 3, 4]},
        REINFORCEMENT | SHORT | {"train.tokens": 3_000_000},
        {"kind": "spelling", "letters": [2, 3, 4]},
    ),
}
BEFORE, REINFORCED = "tuned", "reinforcement"
EQUAL = {"train.tokens": 400_000, "train.learning_rate": 2e-3}
EXAMPLES = EQUAL | {
    "train.batch_size": 16,
    "train.micro_batch_size": 16,
    "train.segments_min": 4,
    "train.segments_max": 4,
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    BEFORE: ("tiny", {}),
    REINFORCED: ("reinforce", {}),
    "reinforcement and KL": ("reinforce", {"train.teacher.share": 0.05}),
    "worked examples": ("instruct", EXAMPLES),
    "distillation": ("instruct", EXAMPLES | {"train.teacher.share": 1.0}),
    "on-policy distillation": (
        "reinforce",
        EQUAL | {"train.teacher.share": 1.0, "train.batch_size": 64, "train.rollouts.samples": 1},
    ),
}
"""A preset and its changes for each row: how the tuned model is trained further."""
EVERYWHERE = list(ROWS)[:3]
"""Rows of every task; the others are of spelling alone."""


def settings(values: dict[str, Any]) -> list[str]:
    """Return the options of a command that set these keys."""
    toml = {
        key: value if isinstance(value, str) else json.dumps(value, separators=(",", "="))
        for key, value in values.items()
    }
    return [word for key, value in toml.items() for word in ("--set", f"{key}={value}")]


def prepare() -> None:
    """Make tokenizer and data, unless they exist."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "corpus").exists():
        rmkv("data", "sample", WORK / "corpus")
    rng = np.random.default_rng(0)
    puzzles = [spelling(letters, rng) for _ in range(8_000) for letters in TASKS["spelling"].exercises["letters"]]
    lines = [json.dumps({"prompt": puzzle.question, "response": puzzle.answer}) + "\n" for puzzle in puzzles]
    (WORK / "spelling.jsonl").write_text("".join(lines))
    for name, task in reversed(TASKS.items()):
        (WORK / f"{name}.mix.toml").write_text(dump_toml(MixConfig.model_validate(task.mix)))
        if not TOKENIZER.exists():
            rmkv("tokenizer", "train", WORK / f"{name}.mix.toml", "--vocab-size", 320, "--out", TOKENIZER)
        if not (WORK / name).exists():
            rmkv("data", "mix", WORK / f"{name}.mix.toml", "--tokenizer", TOKENIZER, "--out", WORK / name)


def example_data(seed: int) -> Path:
    """Return the folder of worked examples of spelling in an order drawn from the seed; make it unless it exists."""
    mix, folder = WORK / f"examples-{seed}.mix.toml", WORK / f"examples-{seed}"
    if not folder.exists():
        mix.write_text(
            dump_toml(MixConfig.model_validate({"seed": seed, "supervise": "answers", "sources": [SPELLED]}))
        )
        rmkv("data", "mix", mix, "--tokenizer", TOKENIZER, "--out", folder)
    return folder


def trained(run: Path, *options: object) -> Path:
    """Train or resume a run; return its folder."""
    if (run / "config.toml").exists():
        rmkv("train", "--resume", "--run", run)
    else:
        rmkv("train", "--run", run, *options)
    return run


def tuned(task: str, row: str, seed: int) -> Path:
    """Train a row's model, and those that it needs, or resume their training; return its run."""
    run = WORK / f"{task}-{row.replace(' ', '-')}-{seed}"
    preset, changes = ROWS[row]
    if row == BEFORE:
        options = {f"model.{key}": value for key, value in MODEL.items()} | TASKS[task].tuning
        return trained(run, "--preset", preset, "--data", WORK / task, *settings(options))
    start = tuned(task, BEFORE, 0)
    options = TASKS[task].reinforcement | {"train.seed": seed} | changes
    if share := changes.get("train.teacher.share"):
        teacher = tuned(task, REINFORCED, 0) if share == 1 else start
        options |= {"train.teacher.precision": "fp32", "train.teacher.model": str(teacher)}
    if preset == "reinforce":
        options["train.rollouts.tasks"] = [TASKS[task].exercises]
        return trained(run, "--from", start, "--preset", preset, *settings(options))
    options = {key: value for key, value in options.items() if "rollouts" not in key}
    return trained(run, "--from", start, "--preset", preset, "--data", example_data(seed), *settings(options))


def answered(model: RMKV, tokenizer: Tokenizer, task: Any, level: str) -> list[tuple[Exercise, Text]]:
    """Return the model's answers at temperature 1 to the fixed exercises of a level."""
    asked: dict[Text, Exercise] = {}

    def texts() -> Iterator[Text]:
        for number in range(EXERCISES):
            exercise = make_exercise(task, level, tokenizer, np.random.default_rng([SEED, number]))
            prompt = read_tokens(model, exercise.prompt)
            for sample in range(SAMPLES):
                how = SamplingConfig(temperature=1.0, top_p=1.0, seed=SAMPLES * number + sample)
                longest, ends = exercise.length or 64, () if exercise.length else None
                text = Text(tokenizer, prompt, how, longest, (), ends, answer=not exercise.length)
                asked[text] = exercise
                yield text

    list(together(Decoder(model, LANES), texts()))
    return [(exercise, text) for text, exercise in asked.items()]


def measured(run: Path, name: str) -> dict[str, Any]:
    """Return pass@1 of each level, an answer, and the loss on held-out documents in nats per token."""
    model, tokenizer = RMKV.from_pretrained(find_model(run)), Tokenizer.load(TOKENIZER)
    (task,) = RolloutsConfig.model_validate({"tasks": [TASKS[name].measured]}).tasks
    figures: dict[str, Any] = {}
    with inference(model):
        for level in levels(task):
            answers = answered(model, tokenizer, task, level)
            scores = [(text.end is not None or bool(e.length)) * e.score(text.ids, text.text) for e, text in answers]
            figures[level.partition(" ")[2]] = mean(scores)
        figures["answers"] = [[e.question[-90:], text.text] for e, text in answers[:: 8 * SAMPLES]]
    held_out = json.loads(rmkv("eval", "--model", run, "--data", WORK / name, "--no-memory", "--json"))["by_source"]
    return figures | {f"{source}, nats": scores["loss"] for source, scores in held_out.items()}


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def record(task: str, row: str, seed: int) -> None:
    """Append the figures of a row's model to the results, unless they exist."""
    if any((result["task"], result["row"], result["seed"]) == (task, row, seed) for result in results()):
        return
    line = json.dumps({"task": task, "row": row, "seed": seed} | measured(tuned(task, row, seed), task))
    with RESULTS.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def table(task: str) -> str:
    """Return a task's results as a Markdown table: mean ± standard deviation over the seeds."""
    found = [result for result in results() if result["task"] == task]
    columns = [key for key, value in max(found, key=len, default={}).items() if isinstance(value, float)]
    return rows_table(f" {task}", found, ROWS, columns)


def rows_table(name: str, found: Sequence[dict[str, Any]], rows: Iterable[str], columns: Sequence[str]) -> str:
    """Return results by row as a Markdown table: mean ± standard deviation over the seeds."""
    lines = [f"|{name} | seeds | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for row in rows:
        if runs := [result for result in found if result["row"] == row]:
            cells = (spread([run[column] for run in runs]) for column in columns)
            lines.append(f"| {row} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    if options.what == "table":
        print("\n\n".join(table(task) for task in options.tasks))
        return
    prepare()
    for seed in options.seeds:
        for task in options.tasks:
            for row in ROWS if task == "spelling" else EVERYWHERE:
                if seed == 0 or row != BEFORE:
                    record(task, row, seed)


if __name__ == "__main__":
    main()
