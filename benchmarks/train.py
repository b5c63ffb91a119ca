"""Training side by side in one run: RMKV, the published formulation, and transformers' Llama of equal parameters.

python benchmarks/train.py
python benchmarks/train.py --lengths 2048 --rounds 3

Each model takes a training step (forward and backward pass, without the optimizer) on the same number of tokens, cut
into rows of the lengths asked for; each in a process of its own, so that its peak of memory is its own, one after the
other, round after round. It needs `pip install -c constraints.txt -e .[bench]`, and on a CPU a C++ compiler.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from peers import same_size, size
from published import Published

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.model import RMKV
from rmkv_cli.training.loss import row_loss

SHAPE = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
INNER, SEGMENT, SLOTS = 768, 256, 32
MODELS = ("RMKV", "RMKV, replayed", "RMKV, slots alone", "published formulation", "Llama")


def rmkv_model(store: int = 2) -> RMKV:
    """Return the model that is compared: slots and stores, or without the stores, as the published formulation is."""
    memory = MemoryConfig(slots=SLOTS, store=store)
    return RMKV(ModelConfig(**SHAPE, intermediate_size=INNER, segment_length=SEGMENT, lookback=64, memory=memory))


def llama() -> torch.nn.Module:
    """Return a Llama whose feed-forward is as wide as it takes for RMKV's number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(inner: int) -> torch.nn.Module:
        rest = {"tie_word_embeddings": True, "use_cache": False, "max_position_embeddings": 131072}
        return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=inner, attn_implementation="sdpa", **rest))

    with torch.device("meta"):
        wanted = size(rmkv_model())
    return make(same_size(make, wanted))


def step_of(name: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """Return a model's loss of rows (B, T) as a function, and its number of parameters."""
    if name == "published formulation":
        layers, heads = SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"]
        old = Published(SHAPE["vocab_size"], SHAPE["hidden_size"], layers, heads, INNER, SLOTS, SEGMENT)
        return lambda rows: old(rows, rows.roll(-1, 1)), size(old)
    if name == "Llama":
        model = llama().train()
        compiled = torch.compile(model, dynamic=False)
        return lambda rows: compiled(input_ids=rows, labels=rows).loss, size(model)
    ours = rmkv_model(store=0 if "alone" in name else 2).train()
    ours.compile_training()

    def loss(rows: torch.Tensor) -> torch.Tensor:
        state, documents = ours.initial_state(len(rows)), torch.zeros_like(rows)
        return row_loss(ours, rows, rows.roll(-1, 1), documents, state, replay="replayed" in name)[0] / rows.numel()

    return loss, size(ours)


def measure(name: str, length: int, tokens: int) -> None:
    """Print as JSON: seconds of a step after the first one, bytes at the peak, parameters."""
    torch.manual_seed(0)
    loss, parameters = step_of(name)
    rows = torch.randint(SHAPE["vocab_size"], (tokens // length, length))
    seconds = []
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        loss(rows).backward()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds[-1], "peak": peak, "parameters": parameters}))


def main() -> None:
    """Measure all models at all lengths, or as a child process one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=32768, help="a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.lengths[0], options.tokens)
        return
    for length in options.lengths:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in options.models}
        for _ in range(options.rounds):
            for name in options.models:
                told = ["--only", name, "--lengths", str(length), "--tokens", str(options.tokens)]
                done = subprocess.run([sys.executable, __file__, *told], capture_output=True, text=True, check=False)
                if done.returncode:  # most often out of memory
                    print(f"{name} at {length:,}: {(done.stderr.splitlines() or ['killed'])[-1]}", file=sys.stderr)
                else:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"\nRows of {length:,} tokens, {options.tokens // length} at once")
        rates = {name: options.tokens / median(run["seconds"] for run in runs) for name, runs in found.items() if runs}
        for name, rate in rates.items():
            peak, parameters = median(run["peak"] for run in found[name]), found[name][0]["parameters"]
            ours = f"RMKV {rates['RMKV'] / rate:5.2f}x" if "RMKV" in rates else ""
            print(f"  {name:<22} {parameters:>9,} parameters {rate:>8,.0f} tokens/s {ours}  {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
