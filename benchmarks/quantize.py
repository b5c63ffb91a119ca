"""Measure quantized models beside float32 and bfloat16: size, quality, speed, memory; and beside llama.cpp.

python benchmarks/quantize.py run                                # everything that is missing: an hour
python benchmarks/quantize.py run --steps quality
python benchmarks/quantize.py run --steps speed contexts --llama ../llama/bin/python
python benchmarks/quantize.py table

Three models: a small one trained on text and recall (the row RMKV of quality.py), the preset 600m with random weights,
and SmolLM2-135M-Instruct as an RMKV (see convert.py). --llama names a Python that has llama-cpp-python 0.3.36, which
then decodes with SmolLM2's own GGUF. Results in quantize/results.jsonl are not computed again. Everything else is
stored in `runs/quantize`, `runs/quality` and `runs/convert`.

Rows are timed with one thread, row after row, in several rounds. Speeds are tokens per second of the process's CPU
time, so that other processes distort them less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import convert
import quality
import torch
from convert import peak
from tuning import rmkv

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.files import atomic_directory
from rmkv_cli.generation import Decoder
from rmkv_cli.model import RMKV, State
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import write_model

HERE = Path(__file__).parent
RESULTS = HERE / "quantize" / "results.jsonl"
WORK = Path("runs/quantize")
SMALL, LARGE, IMPORTED = "small", "600m", "SmolLM2-135M"
SOURCES = {
    SMALL: quality.WORK / "RMKV-0",
    LARGE: WORK / "600m",
    IMPORTED: convert.WORK / "S512-L512-one-slot",
}
MODELS = tuple(SOURCES)
ROWS: dict[str, list[object]] = {  # options of `rmkv quantize`
    "fp32": [],
    "bf16": [],
    "int8": ["--bits", 8],
    "int4": ["--bits", 4, "--group-size", 32],
}
QUANTIZED = ("int8", "int4")
COMPILED = ", compiled"  # end of the name of a row that decodes with a compiled step
KEEP = {(SMALL, "int4"): ["--keep", "feed_forward.down"]}  # whose 393 columns no group size divides
READER = "int8"  # reads the contexts
LLAMA = "llama.cpp, Q4_1"
BESIDE_LLAMA = (*QUANTIZED, *(f"{row}{COMPILED}" for row in QUANTIZED))

RECALL = ["--set", "pairs=[16]", "--set", "segments=[1,3]", "--examples", 128]
MOST = 100_000  # tokens of the small model's held-out text
PROMPT = 512
CONTEXTS = (1024, 8192, 32768)
INSIDE = 256  # further tokens that an RMKV reads before it decodes, to be in the middle of a segment
DECODED, ROUNDS = 24, 3
LIMIT = 1.5  # memory for loading and decoding, as a multiple of the folder's size


def prepare(models: list[str], wheel: Path | None) -> None:
    """Make the models, and quantize them, unless they exist."""
    WORK.mkdir(parents=True, exist_ok=True)
    quality.prepare()
    if SMALL in models:
        quality.trained("RMKV", quality.config_of("RMKV", 0))
    if IMPORTED in models:
        convert.prepare(wheel)
    if LARGE in models and not SOURCES[LARGE].exists():
        torch.manual_seed(0)
        with atomic_directory(SOURCES[LARGE]) as folder:
            write_model(folder, RMKV(load_config(preset_path(LARGE)).model), Tokenizer.load(quality.TOKENIZER))
    for model in models:
        for row, options in ROWS.items():
            if not (folder := folder_of(model, row)).exists():
                rmkv("quantize", SOURCES[model], "--out", folder, *options, *KEEP.get((model, row), []))


def folder_of(model: str, row: str) -> Path:
    """Return the folder of a model's row."""
    return WORK / f"{model}-{row}" if ROWS[row] else SOURCES[model]


def dtype_of(row: str) -> torch.dtype:
    """Return the type that a row computes in."""
    return torch.float32 if row == "fp32" else torch.bfloat16


def loaded(model: str, row: str) -> RMKV:
    """Return the model of a row."""
    return RMKV.from_pretrained(folder_of(model, row), dtype=dtype_of(row))


def scores(model: str, row: str) -> dict[str, Any]:
    """Return the size of a row's weights in memory, bits per byte, and recall of the small model."""
    ours = loaded(model, row)
    figures: dict[str, Any] = {"model": model, "row": row, "bytes": sum(x.nbytes for x in ours.state_dict().values())}
    ask = ["--model", folder_of(model, row), "--dtype", "fp32" if row == "fp32" else "bf16", "--json"]
    if model == SMALL:
        text = json.loads(rmkv("eval", *ask, "--data", quality.DATA, "--max-tokens", MOST, "--no-memory"))
        figures["bits per byte"] = text["by_source"]["python"]["bits_per_byte"]
        report = json.loads(rmkv("eval", *ask, "--data", quality.DATA, "--task", "recall", *RECALL))
        figures |= {f"recall of {cell['row']:g} @{cell['segments']}": cell["accuracy"] for cell in report["cells"]}
    if model == IMPORTED and row == "fp32":  # as convert.py measured it
        known = [x for x in convert.results() if x["row"] == convert.START and "kind" in x]
        figures |= {f"bits per byte, {x['kind']}": x["bits per byte"] for x in known}
    elif model == IMPORTED:
        for kind in convert.HELD_OUT:
            data = convert.CORPUS / f"{kind}-held-out.jsonl"
            report = json.loads(rmkv("eval", *ask, "--data", data, "--no-memory"))
            figures[f"bits per byte, {kind}"] = report["bits_per_byte"]
    return figures


@torch.inference_mode()
def speed(model: str) -> Iterator[dict[str, Any]]:
    """Yield the prefill and decoding rates of a model's rows, round after round."""
    models = {row: loaded(model, row) for row in ROWS}
    for number in range(ROUNDS):
        for row, ours in models.items():
            ids = torch.randint(ours.config.vocab_size, (1, PROMPT))
            state = ours.hidden(ids[:, :INSIDE])[1]
            rates = {"decode": decoding(ours, state), "decode, compiled": decoding(ours, state, compiled=True)}
            begun = time.process_time()
            ours.head(ours.hidden(ids)[0][:, -1])
            prefill = PROMPT / (time.process_time() - begun)
            yield {"model": model, "row": row, "round": number} | rates | {f"prefill of {PROMPT}": prefill}


def decoding(model: RMKV, state: State, *, compiled: bool = False) -> float:
    """Return the tokens per second of decoding after a state."""
    decoder = Decoder(model, compiled=compiled)
    decoder.add(state)
    token = decoder.step(torch.zeros(1, dtype=torch.int64)).argmax(-1)
    begun = time.process_time()
    for _ in range(DECODED):
        token = decoder.step(token).argmax(-1)
    return DECODED / (time.process_time() - begun)


@torch.inference_mode()
def read(row: str) -> Iterator[dict[str, Any]]:
    """Read 32,768 tokens with a row's SmolLM2; store the state after each context, and yield the peak memory so far.

    Decoding with the other rows starts from these states as well: speed and memory do not depend on their values.
    """
    ours, state = loaded(IMPORTED, row), None
    torch.manual_seed(0)
    ids = torch.randint(3, ours.config.vocab_size, (1, max(CONTEXTS) + INSIDE))
    stops = [stop for context in CONTEXTS for stop in (context, context + INSIDE)]
    for start, stop in zip([0, *stops], stops, strict=False):
        if stop < start:
            continue
        begun = time.process_time()
        for first in range(start, stop, ours.config.segment_length):
            state = ours.hidden(ids[:, first : min(stop, first + ours.config.segment_length)], state)[1]
        rate = (stop - start) / (time.process_time() - begun)
        if stop - INSIDE in CONTEXTS:
            assert state is not None
            state.save(stored(stop - INSIDE))
        else:
            yield {"row": row, "read": stop, "tokens per second": rate, "MB": peak() / 1e6}


def stored(context: int) -> Path:
    """Return the file of the state after a context."""
    return WORK / f"state-{context}.safetensors"


def after(row: str, context: int) -> dict[str, Any]:
    """Return the decoding speed of a row's SmolLM2 after a context, and the peak memory of its process."""
    ours = loaded(IMPORTED, row.removesuffix(COMPILED))
    rate = decoding(ours, State.load(stored(context)), compiled=row.endswith(COMPILED))
    return {"tokens per second": rate, "MB": peak() / 1e6}


def load(row: str) -> dict[str, Any]:
    """Load the quantized 600m and decode a token in a process with limited memory; return what it took.

    The limit (RLIMIT_DATA) covers the process's private writable memory: heap, stacks and mappings. What Python and the
    imports take by themselves comes on top of it.
    """
    folder = folder_of(LARGE, row)
    size = sum(file.stat().st_size for file in folder.iterdir())
    decode_one(loaded(SMALL, row))  # the first use of PyTorch takes memory of its own
    before, resident = status("VmData"), status("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (int(before + LIMIT * size),) * 2)
    decode_one(loaded(LARGE, row))
    after = status("VmData")
    return {
        "row": row,
        "folder": size,
        "limit": LIMIT,
        "peak": (peak() - resident) / size,
        "after": (after - before) / size,
    }


def decode_one(model: RMKV) -> Decoder:
    """Decode a token; return the decoder."""
    decoder = Decoder(model)
    decoder.add(model.initial_state(1))
    decoder.step(torch.zeros(1, dtype=torch.int64))
    return decoder


def status(key: str) -> int:
    """Return an entry of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def child(*words: object, python: Path | str = sys.executable, script: Path | str = __file__) -> Any:
    """Run a part of this benchmark in a process of its own with one thread, and return what it reports."""
    command = [str(python), str(script), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def run(steps: list[str], models: list[str], llama: Path | None) -> None:
    """Run the steps, except those that have results."""
    for model in models if "quality" in steps else ():
        for row in ROWS:
            if missing(step="quality", model=model, row=row):
                record("quality", scores(model, row))
    if "load" in steps:
        for row in QUANTIZED:
            if missing(step="load", row=row):
                record("load", child("load", LARGE, row))
    if "read" in steps and missing(step="read"):
        record("read", *child("read", IMPORTED, READER))
    for model in models if "speed" in steps else ():
        if missing(step="speed", model=model):
            record("speed", *child("speed", model))
    for number in range(ROUNDS) if "contexts" in steps else ():
        for context in CONTEXTS:
            for row in [*([LLAMA] if llama else []), *BESIDE_LLAMA]:
                key = {"row": row, "context": context, "round": number}
                if not missing(step="contexts", **key):
                    continue
                if row == LLAMA:
                    (gguf,) = convert.WORK.glob("*/*.gguf")
                    figures = child(gguf, context, python=llama, script=HERE / "gguf_decode.py")
                else:
                    figures = child("after", IMPORTED, row, context)
                record("contexts", key | figures)


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def record(step: str, *lines: dict[str, Any]) -> None:
    """Append results of a step to the file, and print them."""
    RESULTS.parent.mkdir(exist_ok=True)
    for line in lines:
        with RESULTS.open("a") as file:
            file.write(json.dumps({"step": step} | line) + "\n")
        print(json.dumps(line), flush=True)


def missing(**keys: object) -> bool:
    """Return whether no result so far has these entries."""
    return not any(keys.items() <= result.items() for result in results())


def table() -> str:
    """Return the results as Markdown tables."""
    return "\n\n".join("\n".join(lines) for lines in [*model_tables(), context_table(), memory_table()])


def found(step: str, **keys: object) -> list[dict[str, Any]]:
    """Return the results of a step that have these entries."""
    return [result for result in results() if ({"step": step} | keys).items() <= result.items()]


def model_tables() -> Iterator[list[str]]:
    """Yield a table per model: size and quality with their change from float32, speeds as ratios to float32."""
    for model in MODELS:
        scored = {result["row"]: result for result in found("quality", model=model)}
        figures = [key for key in next(iter(scored.values()), {}) if key not in ("step", "model", "row", "bytes")]
        rounds = found("speed", model=model)
        speeds = [key for key in (rounds[0] if rounds else ()) if key not in ("step", "model", "row", "round")]
        lines = [f"| {' | '.join([model, 'MB', *figures, *speeds])} |", f"|{' --- |' * (2 + len(figures + speeds))}"]
        for row in ROWS:
            own, before = scored.get(row, {}), scored.get("fp32", {})
            cells = [row, f"{own['bytes'] / 1e6:,.1f}" if own else ""]
            cells += [changed(own.get(key), before.get(key), "recall" in key) for key in figures]
            cells += [ratio(rounds, row, key) for key in speeds]
            lines.append(f"| {' | '.join(cells)} |")
        yield lines


def changed(value: float | None, before: float | None, absolute: bool) -> str:
    """Return a figure and its change, as far as they are known."""
    if value is None or before is None or value == before:
        return "" if value is None else f"{value:.4f}"
    return f"{value:.4f} ({value - before:+.4f})" if absolute else f"{value:.4f} ({value / before - 1:+.2%})"


def ratio(rounds: list[dict[str, Any]], row: str, key: str, base: str = "fp32") -> str:
    """Return a row's median rate, and the median of its ratios to the base in the same round."""
    rates = {(result["row"], result["round"]): result[key] for result in rounds}
    own = [rate for (name, _), rate in rates.items() if name == row]
    if not own:
        return ""
    ratios = [rates[row, i] / rates[base, i] for name, i in rates if name == base and (row, i) in rates]
    times = f" ({median(ratios):.2f}x)" if ratios and row != base else ""
    return f"{median(own):,.1f}{times}"


def context_table() -> list[str]:
    """Return decoding speeds after each context beside llama.cpp, and peak memory."""
    rows = [LLAMA, *BESIDE_LLAMA]
    lines = [f"| after tokens | {' | '.join(rows)} | {' | '.join(f'MB, {row}' for row in rows)} |"]
    lines.append(f"|{' --- |' * (1 + 2 * len(rows))}")
    for context in CONTEXTS:
        rounds = found("contexts", context=context)
        sizes = [[result["MB"] for result in rounds if result["row"] == row] for row in rows]
        cells = [ratio(rounds, row, "tokens per second", LLAMA) for row in rows]
        cells += [f"{median(size):,.0f}" if size else "" for size in sizes]
        lines.append(f"| {context:,} | {' | '.join(cells)} |")
    return lines


def memory_table() -> list[str]:
    """Return the memory of reading a long text, and of loading in a limited process."""
    lines = ["| row | read tokens | tokens per second | MB |", "| --- | --- | --- | --- |"]
    for result in found("read"):
        rate, size = result["tokens per second"], result["MB"]
        lines.append(f"| {result['row']} | {result['read']:,} | {rate:.1f} | {size:,.0f} |")
    lines += [
        "",
        "| 600m, loaded | folder, MB | limit | peak of resident memory | data at the end |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in found("load"):
        cells = [
            result["row"],
            f"{result['folder'] / 1e6:,.0f}",
            *(f"{result[x]:.2f}" for x in ("limit", "peak", "after")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run the missing measurements, or print the tables."""
    parts: dict[str, Callable[..., Any]] = {"speed": lambda model: list(speed(model))}
    parts |= {"read": lambda _, row: list(read(row))}
    parts |= {"after": lambda _, row, context: after(row, context), "load": lambda _, row: load(row)}
    steps = ["quality", "load", "read", "speed", "contexts"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", *parts])
    parser.add_argument("part", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--llama", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--wheel", type=Path, help=f"path of {convert.WHEEL}, to skip the download")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
    elif options.what == "run":
        prepare(options.models, options.wheel)
        run(options.steps, options.models, options.llama)
    else:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        names, context = options.part[:2], options.part[2:]
        print(json.dumps(parts[options.what](*names, *map(int, context))))


if __name__ == "__main__":
    main()
