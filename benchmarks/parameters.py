"""Measure where RMKV's parameters pay: alternatives to its parts at equal parameters and at equal compute.

python benchmarks/curves.py prepare                  # the corpus, tokenizer and data are those of curves.py
python benchmarks/parameters.py run
python benchmarks/parameters.py run --rows RMKV "diagonal cells" --sizes 6M --tokens 4 --seeds 0 1
python benchmarks/parameters.py table
python benchmarks/parameters.py rmkv "diagonal cells" train ...    # any rmkv command on the row's model

The width of the feed-forward makes each row equal to RMKV: once in parameters, once in operations per token. RMKV has
two features of store keys here, as in the large presets, and the parameters of the models of curves.py. Some rows are
settings; others are patches (patches.py). Results in parameters/results.jsonl are not computed again, and a stopped
run resumes. Runs are stored in `runs/parameters`. It needs the extra `bench`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import patches
import peers
import torch
from curves import CONFIG, DATA, DISTANCES, PARTS, SIZES, commit, evaluate, settings_of
from memory import spread
from patches import Patch
from torch.utils.flop_counter import FlopCounterMode

from rmkv_cli.__main__ import main as rmkv
from rmkv_cli.config import load_config
from rmkv_cli.model import RMKV, inference

RESULTS = Path(__file__).parent / "parameters/results.jsonl"
WORK = Path("runs/parameters")
BASES = ("equal parameters", "equal compute")
BOTH = "both"  # the basis of a row that needs the same width for either

STORE_FEATURES = ["model.memory.store_features=2"]  # of all rows that set no others
ROWS: dict[str, tuple[Callable[[], Patch], list[str]]] = {  # a patch and settings
    "RMKV": (nullcontext, []),
    "one cell for all layers": (patches.one_cell, []),
    "cells of rank D/8": (partial(patches.gru_of, patches.low_rank), []),
    "diagonal cells": (partial(patches.gru_of, patches.Diagonal), []),
    "MinimalRNN": (nullcontext, ["model.memory.cell=minimal"]),
    "slots never updated": (nullcontext, ["model.memory.update=none"]),
    "no slots": (nullcontext, ["model.memory.slots=0"]),
    "slots in the lower half": (partial(patches.slots_in, "lower"), []),
    "slots in the upper half": (partial(patches.slots_in, "upper"), []),
    "one cell, a store in each layer": (patches.one_cell, ["model.memory.store=4"]),
    "pooling over X": (patches.pooling_over_x, []),
    "store heads apart": (patches.store_heads_apart, []),
    "2 heads": (nullcontext, ["model.num_attention_heads=2"]),
    "no store features": (nullcontext, ["model.memory.store_features=0"]),
    "store features 4": (nullcontext, ["model.memory.store_features=4"]),
    "8 experts, 2 per token": (nullcontext, ["model.experts=8"]),
}


def patched(row: str) -> Patch:
    """Return the context in which a row's models are built, trained and evaluated."""
    make_patch, _ = ROWS[row]
    return make_patch()


def build(row: str, size: str, inner: int | None = None) -> RMKV:
    """Return a row's model without weights, with a feed-forward of width `inner`; call it under the row's patch."""
    settings = [*SIZES[size], *STORE_FEATURES, *ROWS[row][1]]
    settings += [f"model.intermediate_size={inner}"] if inner else []
    with torch.device("meta"):
        return RMKV(load_config(CONFIG, settings).model)


def control(size: str) -> tuple[int, float]:
    """Return the parameters and the operations per token that the rows of a size equal."""
    with torch.device("meta"):
        parameters = peers.size(RMKV(load_config(CONFIG, SIZES[size]).model))
    make = partial(build, "RMKV", size)
    return parameters, flops(make(peers.same_size(make, parameters)))


def flops(model: RMKV) -> float:
    """Return the forward pass's operations per token in a whole segment, counted in a model on the meta device.

    For an unpatched model it is the sum of `rmkv_cli.model.cost.forward_flops_per_token`.
    """

    def solve(system: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
        return system[-1] * right.numel()

    S = model.config.segment_length
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: solve})
    with counter:
        model.requires_grad_(False)(torch.zeros(1, S, dtype=torch.int64, device="meta"))
    products = model.config.experts_per_token * 6 * model.config.hidden_size * model.config.expert_width
    experts = sum(products for block in model.blocks if block.experts is not None)  # the counter does not see them
    return counter.get_total_flops() / S + experts


def widths(row: str, size: str, parameters: int, operations: float) -> dict[str, int]:
    """Return the width of a row's feed-forward by basis, for so many parameters and operations per token."""
    make = partial(build, row, size)
    least = flops(make(8))
    same_size = peers.same_size(make, parameters)
    same_compute = 8 + round((operations - least) / (flops(make(9)) - least))
    return {BOTH: same_size} if same_size == same_compute else dict(zip(BASES, (same_size, same_compute), strict=True))


def train(row: str, folder: Path, settings: list[str]) -> None:
    """Train a row's model, or resume its training; nothing happens if it is complete."""
    words = ["--run", str(folder)]
    if (folder / "config.toml").exists():
        words += ["--resume"]
    else:
        words += ["--config", str(CONFIG), "--data", str(DATA)]
        words += [word for setting in settings for word in ("--set", setting)]
    print(f"{folder.name}:", *settings, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, __file__, "rmkv", row, "train", *words], check=True, stdout=subprocess.DEVNULL)


def run(key: dict[str, Any], inner: int) -> None:
    """Train and evaluate a row's model under the row's patch, and append its figures to the results."""
    row, size, tokens, rate, seed = (key[name] for name in ("row", "size", "tokens", "rate", "seed"))
    settings = [*settings_of(size, seed, rate, tokens), *STORE_FEATURES, *ROWS[row][1]]
    settings += [f"model.intermediate_size={inner}", "train.keep_last=1"]
    folder = WORK / f"{row}-{size}-{tokens}-{key['basis']}-{rate:g}-{seed}".replace(" ", "-").replace("/", "-")
    train(row, folder, settings)
    config = load_config(CONFIG, settings)
    model = RMKV.from_pretrained(folder)
    window = config.train.segments_max * config.model.segment_length
    with inference(model):
        figures = evaluate(lambda input_ids: peers.logits(model, input_ids, window))
    sizes = {"parameters": peers.size(model), "flops_per_token": flops(build(row, size, inner))}
    result = key | sizes | figures | {"commit": commit(), "config": config.model_dump()}
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{folder.name}: {figures['bits_per_byte']['all']:.3f} bits per byte", file=sys.stderr, flush=True)


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> Iterator[str]:
    """Yield a Markdown table per size, tokens, learning rate and basis: mean ± standard deviation over the seeds.

    Results of rows that are no longer in ROWS come last.
    """
    found = results()
    names = ["", "seeds", "parameters", "MFLOPs", *PARTS, *(f"recall @{n}" for n in DISTANCES)]
    groups = sorted({(r["size"], r["tokens"], r["rate"]) for r in found})
    for (size, tokens, rate), basis in product(groups, BASES):
        yield f"{size}, {tokens / 1e6:g}M tokens, rate {rate:g}, {basis}:\n"
        yield "| " + " | ".join(names) + " |\n| " + " | ".join(["---"] * len(names)) + " |"
        for row in dict.fromkeys([*ROWS, *(r["row"] for r in found)]):
            key = {"row": row, "size": size, "tokens": tokens, "rate": rate}
            runs = [r for r in found if key.items() <= r.items() and r["basis"] in (basis, BOTH)]
            if runs:
                cells = [row, str(len(runs)), f"{runs[0]['parameters']:,}", f"{runs[0]['flops_per_token'] / 1e6:.3f}"]
                cells += [spread([r["bits_per_byte"][part] for r in runs]) for part in PARTS]
                cells += [spread([float(r["recall"][str(n)]) for r in runs]) for n in DISTANCES]
                yield "| " + " | ".join(cells) + " |"
        yield ""


def main() -> None:
    """Run what is missing, print the tables, or run an rmkv command on a row's model."""
    if sys.argv[1:2] == ["rmkv"]:
        with patched(sys.argv[2]):
            sys.argv = ["rmkv", *sys.argv[3:]]
            rmkv()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", nargs="+", type=float, default=[1, 4], help="in millions")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    if options.what == "table":
        print(*table(), sep="\n")
        return
    for folder in (WORK, RESULTS.parent):
        folder.mkdir(parents=True, exist_ok=True)
    controls = {size: control(size) for size in options.sizes}
    for size, tokens, seed, row in product(options.sizes, options.tokens, options.seeds, options.rows):
        with patched(row):
            for basis, inner in widths(row, size, *controls[size]).items():
                key = {"row": row, "size": size, "seed": seed, "tokens": round(tokens * 1e6), "basis": basis}
                key["rate"] = options.rate
                if not any(key.items() <= result.items() for result in results()):
                    run(key, inner)


if __name__ == "__main__":
    main()
