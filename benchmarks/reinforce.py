"""Show what reinforcement brings a model that solves a task now and then, and what the model forgets.

python benchmarks/reinforce.py run
python benchmarks/reinforce.py run --tasks recall --seeds 0
python benchmarks/reinforce.py table

Two models of 0.1M parameters learn a task from worked examples, until they answer correctly now and then: to recall
values across up to one segment of noise, and to spell made-up words. Reinforcement then trains them on the task, recall
across longer noise. Each model answers fixed exercises of every level at temperature 1, and reads held-out documents of
the data it was tuned on. Results in reinforce/results.jsonl are not computed again, and a stopped run resumes. Runs are
stored in `runs/reinforce`. On one free core, a seed takes one minute of recall and three of spelling.
"""

import argparse
import json
from collections.abc import Iterator
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
        {"tokens": 1_000_000, "validation": 0.02, "sources": [RECALL | {"weight": 1, "segments": [0, 1]}]},
        TUNING | {"train.tokens": 24_000, "model.segment_length": 16, "model.lookback": 8},
        RECALL | {"segments": [2, 3]},
        REINFORCEMENT | {"train.tokens": 450_000},
        RECALL | {"segments": [1, 3, 7, 15]},
    ),
    "spelling": Task(
        {"validation": 0.02, "supervise": "answers", "sources": [SPELLED]},
        TUNING | {"train.tokens": 220_000},
        {"kind": "spelling", "letters": [2, 3, 4]},
        REINFORCEMENT | SHORT | {"train.tokens": 1_500_000},
        {"kind": "spelling", "letters": [2, 3, 4]},
    ),
}


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


def trained(run: Path, *options: object) -> Path:
    """Train or resume a run; return its folder."""
    if (run / "config.toml").exists():
        rmkv("train", "--resume", "--run", run)
    else:
        rmkv("train", "--run", run, *options)
    return run


def start(task: str) -> Path:
    """Return the run whose model solves a task now and then."""
    changes = settings({f"model.{key}": value for key, value in MODEL.items()} | TASKS[task].tuning)
    return trained(WORK / f"{task}-start", "--preset", "tiny", "--data", WORK / task, *changes)


def reinforced(task: str, seed: int) -> Path:
    """Return the run of the reinforced model."""
    _, _, exercises, reinforcement, _ = TASKS[task]
    changes = settings(reinforcement | {"train.seed": seed, "train.rollouts.tasks": [exercises]})
    how = ["--from", WORK / f"{task}-start", "--preset", "reinforce"]
    return trained(WORK / f"{task}-{seed}", *how, *changes)


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
            figures[level] = mean(scores)
        figures["answers"] = [[e.question[-90:], text.text] for e, text in answers[:: 8 * SAMPLES]]
    figures["loss"] = json.loads(rmkv("eval", "--model", run, "--data", WORK / name, "--no-memory", "--json"))["loss"]
    return figures


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(name: str, seed: int | None) -> None:
    """Append the figures of a task's tuned or, with a seed, reinforced model to the results, unless they exist."""
    if any((result["task"], result["seed"]) == (name, seed) for result in results()):
        return
    folder = start(name) if seed is None else reinforced(name, seed)
    line = json.dumps({"task": name, "seed": seed} | measured(folder, name))
    with RESULTS.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def table() -> str:
    """Return the results as a Markdown table: the tuned model, and mean ± standard deviation over the seeds."""
    lines = ["| | before | after | seeds |", "| --- | --- | --- | --- |"]
    for name in TASKS:
        runs = [result for result in results() if result["task"] == name]
        before = [result for result in runs if result["seed"] is None]
        after = [result for result in runs if result["seed"] is not None]
        for key in before[0] if before and after else ():
            if isinstance(before[0][key], float):
                cells = (spread([result[key] for result in some]) for some in (before, after))
                what = f"{name}: held-out loss" if key == "loss" else key
                lines.append(f"| {what} | {' | '.join(cells)} | {len(after)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    prepare()
    for seed in (None, *options.seeds):
        for name in options.tasks:
            run(name, seed)


if __name__ == "__main__":
    main()
