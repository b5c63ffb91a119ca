"""What the memory is worth: the same small model with and without its parts, on tasks and on real text.

python benchmarks/memory.py run recall text --seeds 0 1 2
python benchmarks/memory.py table

Goes on where it stopped: what is in memory/results.jsonl is not run again. The commands are printed as they run, from
the folder `runs/memory`. A variant takes minutes a seed on one core; with OMP_NUM_THREADS=1 two can run at once.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import sympy
import torch

from rmkv_cli.config import FactsSource
from rmkv_cli.data.tasks.facts import make_story
from rmkv_cli.model.pretrained import CHECKSUMS

HERE = Path(__file__).parent
STUDIES = HERE / "memory"
RESULTS = STUDIES / "results.jsonl"
WORK = Path("runs/memory")

OFF = ["model.memory.slots=0", "model.memory.store=0"]
EACH = "model.memory.store=4"  # a store in each layer, of which no model here has more
VARIANTS = {
    "slots and one store": ["model.memory.store=1"],
    "slots and stores": [EACH],
    "slots and stores, rate 1e-3": [EACH, "train.learning_rate=1e-3"],
    "slots and stores, rate 1e-2": [EACH, "train.learning_rate=1e-2"],
    "slots and stores, Muon": [EACH, "train.optimizer=muon"],
    "slots and stores, Muon, rate 1e-3": [EACH, "train.optimizer=muon", "train.learning_rate=1e-3"],
    "slots and stores, Muon, rate 1e-2": [EACH, "train.optimizer=muon", "train.learning_rate=1e-2"],
    "stores, slots never updated": [EACH, "model.memory.update=none"],
    "stores, slots never updated, wider": [EACH, "model.memory.update=none", "model.intermediate_size=$wider"],
    "stores alone": [EACH, "model.memory.slots=0"],
    "slots": ["model.memory.store=0"],
    "slots, published update": ["model.memory.store=0", "model.memory.update=published"],
    "slots never updated": ["model.memory.store=0", "model.memory.update=none"],
    "no memory, twice the look-back": [*OFF, "model.lookback=$twice"],
    "no memory, twice the look-back, Muon": [*OFF, "model.lookback=$twice", "train.optimizer=muon"],
    "full attention": [
        *OFF,
        "model.segment_length=$whole",
        "model.lookback=$whole",
        "train.segments_min=1",
        "train.segments_max=1",
    ],
}
QUESTIONS: dict[str, list[tuple[str, list[str]]]] = {  # of each study: what is asked, with which settings
    "recall": [
        ("recall", ["pairs=[1,2,4,8,16,32,64,96,128]", "segments=[31]"]),
        ("recall", ["pairs=[1,16]", "segments=[127]"]),
        ("recall", ["pairs=[1,16]", "segments=[1023]"]),
        ("overwritten", ["pairs=[1,16]", "segments=[31]", "rounds=4"]),
    ],
    "copy": [("copy", ["length=[24,48,96]", "segments=[0,7]"])],
    "needle": [("needle", ["depth=[0,0.5,1]", "segments=[16,64]"])],
    "facts": [("facts", ["segments=[4,16,64]", "queries=1", "along=false"])],
    "text": [],
    "short": [],
}
TABLES = {  # of each study: which figures stand in a table
    "recall": [
        [*(f"recall {cell}" for cell in ("1@31", "1@127", "1@1023", "16@31", "16@127", "16@1023", "64@31"))],
        [*(f"recall {pairs}@31" for pairs in (2, 4, 8, 16, 32, 64, 96, 128))],
        ["overwritten 1@31", "overwritten 16@31", "parameters"],
    ],
    "copy": [[f"copy {length}@{segments}" for length in (24, 48, 96) for segments in (0, 7)]],
    "needle": [[f"needle {depth}@{segments}" for segments in (16, 64) for depth in (0, 0.5, 1)]],
    "facts": [["facts 1@4", "facts 1@16", "facts 1@64"]],
    "text": [
        ["loss", *(f"from {first}" for first in (0, 64, 128, 512, 2048, 4096, 8192))],
        ["reset costs", "another's costs", "parameters"],
    ],
    "short": [["loss", "from 0", "from 512", "from 4096", "reset costs", "parameters"]],
}
HELD_OUT = sorted(Path(sympy.__file__).parent.glob("core/[a-e]*.py"))
WHOLE = 512  # tokens a segment, and as many of look-back, of the control that attends to everything
TOKENIZERS = {  # of each study: the mix that its tokenizer learns from, and its size
    "recall": ("text", 512),
    "copy": ("text", 512),
    "needle": ("text", 2048),
    "facts": ("words", 2048),
    "text": ("text", 2048),
}
SHORT = {"short": ("text", ["train.tokens=1000000"])}  # studies that are another one, with these settings
STORIES = 5000  # that the tokenizer for facts learns from, so that their words are tokens


def rmkv(*words: str) -> str:
    """Run an rmkv command in the work folder, say which, and return what it printed."""
    print("rmkv " + shlex.join(words), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "rmkv_cli", *words]
    with (WORK / "log.txt").open("a") as log:
        return subprocess.run(command, check=True, cwd=WORK, stdout=subprocess.PIPE, stderr=log, text=True).stdout


def prepare(study: str) -> None:
    """Make the study's tokenizer and mix, unless they are there."""
    source, size = TOKENIZERS[study]
    for name in (source, study):
        mix = (STUDIES / f"{name}.mix.toml").read_text()
        for module in (torch, sympy):
            mix = mix.replace(f"${module.__name__}", str(Path(module.__file__).parent))
        (WORK / f"{name}.mix.toml").write_text(mix)
    (WORK / f"{study}.toml").write_text((STUDIES / f"{study}.toml").read_text())
    if source == "words":
        (WORK / "stories.txt").write_text("\n".join(stories()))
    tokenizer = f"tokenizer-{source}-{size}.json"
    if not (WORK / tokenizer).exists():
        rmkv("tokenizer", "train", f"{source}.mix.toml", "--vocab-size", str(size), "--out", tokenizer)
    if not (WORK / f"{study}-data").exists():
        rmkv("data", "mix", f"{study}.mix.toml", "--tokenizer", tokenizer, "--out", f"{study}-data")


def stories() -> Iterator[str]:
    """Yield stories with their questions and answers."""
    rng = np.random.default_rng(0)
    for _ in range(STORIES):
        yield "".join(f" {text}" for piece in make_story(rng, FactsSource(), 1) for text, _ in piece)


def run(study: str, variant: str, seed: int) -> dict[str, Any]:
    """Train a variant with a seed, or resume its training, and return its figures."""
    name = f"{study}-{variant.replace(',', '').replace(' ', '-')}-{seed}"
    files, more = SHORT.get(study, (study, []))
    model = tomllib.loads((STUDIES / f"{files}.toml").read_text())["model"]
    values = {
        "$twice": 2 * model["lookback"],
        "$whole": WHOLE,
        # by as many weights as a GRU (6 D² + 6 D) and the pooling (m D) have, at 3 D a unit
        "$wider": model["intermediate_size"] + (6 * model["hidden_size"] + 6 + model["memory"]["slots"]) // 3,
    }
    settings = [f"train.seed={seed}", *more, *VARIANTS[variant]]
    for key, value in values.items():
        settings = [setting.replace(key, str(value)) for setting in settings]
    if (WORK / name / "config.toml").exists():
        rmkv("train", "--run", name, "--resume")
    else:
        overrides = [word for setting in settings for word in ("--set", setting)]
        rmkv("train", "--config", f"{files}.toml", "--data", f"{files}-data", "--run", name, *overrides)
    steps = [json.loads(line) for line in (WORK / name / "metrics.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {"study": study, "variant": variant, "seed": seed}
    costs = json.loads(rmkv("params", "--config", f"{name}/config.toml", "--json"))
    result |= {"tokens": steps[-1]["tokens"], "parameters": costs["parameters"]}
    if files == "text":
        report = json.loads(rmkv("eval", "--model", name, "--data", "text-data", "--max-tokens", "200000", "--json"))
        return result | {key: report[key] for key in ("loss", "by_position", "memory")}
    return result | {"accuracy": list(ask(study, name, variant))}


def ask(study: str, name: str, variant: str) -> Iterator[dict[str, Any]]:
    """Yield each cell's accuracy."""
    for title, settings in QUESTIONS[study]:
        model = name
        if variant == "full attention":
            if "1023" in settings[-1]:
                continue  # 32,000 tokens of it at once
            model = lengthened(name, 8192)
            settings = [*settings, "segment_length=32"]
        words = [word for setting in settings for word in ("--set", setting)]
        kind = "recall" if title == "overwritten" else title
        if study in ("needle", "facts"):  # their noise is text that no training has seen
            words += [word for file in HELD_OUT for word in ("--text", str(file))]
        if study == "needle":
            words += ["--examples", "128"]
        report = rmkv("eval", "--model", model, "--data", f"{study}-data", "--task", kind, *words, "--json")
        for cell in json.loads(report)["cells"]:
            yield {"task": title, **{key: cell[key] for key in ("row", "segments", "answers", "accuracy")}}


def lengthened(name: str, segment_length: int) -> str:
    """Return a copy of a model without memory that reads so many tokens as one segment."""
    copy = WORK / f"{name}-long"
    if not copy.exists():
        source = (WORK / name / "latest").resolve()
        copy.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.name not in ("config.json", CHECKSUMS):
                os.link(file, copy / file.name)
        config = json.loads((source / "config.json").read_text()) | {"segment_length": segment_length}
        (copy / "config.json").write_text(json.dumps(config))
    return copy.name


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation over the seeds; a count, the same with each, as a whole number."""
    if isinstance(values[0], int):
        return f"{values[0]:,}"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def tables(study: str) -> Iterator[str]:
    """Yield the study's results as Markdown tables, a line a variant."""
    found = [result for result in results() if result["study"] == study]
    for columns in TABLES[study]:
        lines = [f"| {study} | seeds | " + " | ".join(columns) + " |", "| --- |" + " --- |" * (1 + len(columns))]
        for variant in VARIANTS:
            runs = [dict(figures(result)) for result in found if result["variant"] == variant]
            if runs:
                cells = ([run[column] for run in runs if column in run] for column in columns)
                shown = " | ".join(spread(values) if values else "" for values in cells)
                lines.append(f"| {variant} | {len(runs)} | {shown} |")
        yield "\n".join(lines)


def figures(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the columns of a result's line: its name and its figure."""
    for cell in result.get("accuracy", []):
        yield f"{cell['task']} {cell['row']:g}@{cell['segments']}", cell["accuracy"]
    if "loss" in result:
        yield "loss", result["loss"]
        for part in result["by_position"]:
            yield f"from {part['first']}", part["loss"]
        if result["memory"]:
            yield "reset costs", result["memory"]["reset_cost"]
            yield "another's costs", result["memory"]["swapped_cost"]
    yield "parameters", result["parameters"]


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("studies", nargs="*", default=list(QUESTIONS), metavar="STUDY", help=", ".join(QUESTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    if options.what == "table":
        for study in options.studies:
            print(*tables(study), sep="\n\n", end="\n\n")
        return
    WORK.mkdir(parents=True, exist_ok=True)
    for study in options.studies:
        prepare(SHORT.get(study, (study,))[0])
        for seed in options.seeds:
            for variant in options.variants:
                key = {"study": study, "variant": variant, "seed": seed}
                if not any(key.items() <= result.items() for result in results()):
                    result = run(study, variant, seed)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
