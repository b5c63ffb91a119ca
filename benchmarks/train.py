"""Training side by side in one run: RMKV, the published formulation, and transformers' Llama of equal parameters.

python benchmarks/train.py
python benchmarks/train.py --lengths 2048 --rounds 3
python benchmarks/train.py --preset 600m --precision bf16 --tokens 16384    # on a GPU, which is used where there is one

Each model takes a training step (forward and backward pass, without the optimizer) on the same number of tokens, cut
into rows of the lengths asked for; each in a process of its own, so that its peak of memory is its own, one after the
other, round after round. It needs `pip install -c constraints.txt -e .[bench]`, and on a CPU a C++ compiler.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from peers import llama, same_size, size
from published import Published

from rmkv_cli.config import Config, load_config, preset_path
from rmkv_cli.model import RMKV
from rmkv_cli.model.cost import count_by_part
from rmkv_cli.training import resolve_device
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.loss import compiled_segment, row_loss
from rmkv_cli.training.memory import peak_memory
from rmkv_cli.training.utilization import device_peak, training_flops_per_token
from rmkv_cli.training.working import WorkingModel

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "segment_length": 256,
    "lookback": 64,
    "memory": {"slots": 32},
}
CPU_LIMIT = 20_000_000  # parameters: a step takes minutes beyond
MODELS = ("RMKV", "RMKV, replayed", "RMKV, slots alone", "published formulation", "Llama")


def config_of(preset: str | None) -> Config:
    """Return the config of the model that is compared: slots and stores."""
    return load_config(preset_path(preset)) if preset else Config.model_validate({"model": SHAPE})


def step_of(name: str, config: Config, precision: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """Return a model's loss of rows (B, T) as a function, and its number of parameters."""
    model = config.model
    if name == "published formulation":
        shape = model.vocab_size, model.hidden_size, model.num_hidden_layers, model.num_attention_heads
        old = Published(*shape, model.intermediate_size, model.memory.slots, model.segment_length)
        return lambda rows: old(rows, rows.roll(-1, 1)), size(old)
    if name == "Llama":
        with torch.device("meta"):
            wanted = size(RMKV(model))
        peer = llama(config, same_size(lambda inner: llama(config, inner), wanted)).train()
        compiled = torch.compile(peer, dynamic=False)
        return lambda rows: compiled(input_ids=rows, labels=rows).loss, size(peer)
    if "alone" in name:  # without the stores, as the published formulation is
        model = model.model_copy(update={"memory": model.memory.model_copy(update={"store": 0})})
    working = WorkingModel(RMKV(model), torch.bfloat16 if precision == "bf16" else torch.float32, Ranks("cpu"))
    ours = working.model.train()
    segment = compiled_segment(ours)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        working.copy_weights()
        state, documents = ours.initial_state(len(rows)), torch.zeros_like(rows)
        how = {"replay": "replayed" in name, "segment": segment}
        with torch.autocast(rows.device.type, enabled=False):
            return row_loss(ours, rows, rows.roll(-1, 1), documents, state, **how)[0] / rows.numel()

    return loss, size(ours)


def measure(name: str, length: int, tokens: int, preset: str | None, precision: str) -> None:
    """Print as JSON: seconds of a step after the first one, bytes at the peak, parameters, RMKV's share of the peak."""
    torch.manual_seed(0)
    device, config = resolve_device("auto"), config_of(preset)
    if device == "cuda" and precision == "bf16":  # as the trainer does
        torch.set_float32_matmul_precision("high")
    seconds = []
    with torch.device(device):
        loss, parameters = step_of(name, config, precision)
        rows = torch.randint(config.model.vocab_size, (tokens // length, length))
    for _ in range(2):  # the first compiles, which it cannot where a device is the default
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(rows)
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    figures = {"seconds": seconds[-1], "peak": peak_memory(device), "parameters": parameters}
    if name in ("RMKV", "RMKV, replayed") and (peak := device_peak(device, precision)):
        figures["mfu"] = training_flops_per_token(config.model) * tokens / seconds[-1] / peak
    print(json.dumps(figures))


def main() -> None:
    """Measure all models at all lengths, or as a child process one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=32768, help="a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--preset", help="compare models of its shape [default: one of 6M parameters]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.lengths[0], options.tokens, options.preset, options.precision)
        return
    parameters = count_by_part(config_of(options.preset).model)
    if resolve_device("auto") == "cpu" and sum(parameters.values()) > CPU_LIMIT:
        parser.error(f"preset {options.preset} needs a GPU; on a CPU, choose --preset tiny")
    for length in options.lengths:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in options.models}
        for _ in range(options.rounds):
            for name in options.models:
                words = ["--only", name, "--lengths", str(length), "--tokens", str(options.tokens)]
                words += ["--precision", options.precision, *(["--preset", options.preset] if options.preset else [])]
                done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
                if done.returncode:  # most often out of memory
                    print(f"{name} at {length:,}: {(done.stderr.splitlines() or ['killed'])[-1]}", file=sys.stderr)
                else:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"\nRows of {length:,} tokens, {options.tokens // length} at once")
        rates = {name: options.tokens / median(run["seconds"] for run in runs) for name, runs in found.items() if runs}
        for name, rate in rates.items():
            peak, parameters = median(run["peak"] for run in found[name]), found[name][0]["parameters"]
            ours = f"RMKV {rates['RMKV'] / rate:5.2f}x" if "RMKV" in rates else ""
            mfu = f"  MFU {median(run['mfu'] for run in found[name]):.1%}" if "mfu" in found[name][0] else ""
            print(f"  {name:<22} {parameters:>9,} parameters {rate:>8,.0f} tokens/s {ours}  {peak / 1e9:.2f} GB{mfu}")


if __name__ == "__main__":
    main()
