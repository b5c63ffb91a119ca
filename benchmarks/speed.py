"""Ratios of times, each pair measured in turns within one run: what does the memory cost, and what does replay?

python benchmarks/speed.py
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.model import RMKV
from rmkv_cli.training.loss import row_loss


def compare(title: str, unit: int, work: dict[str, Callable[[], object]], rounds: int = 7) -> None:
    """Print each work's rate in tokens per second, `unit` tokens a call, and its ratio to the first one's."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    rates = {name: unit / median(seconds[1:]) for name, seconds in times.items()}  # the first round warms up
    print(title)
    for name, rate in rates.items():
        print(f"  {name:<44} {rate:>9,.1f} tokens/s   {rate / next(iter(rates.values())):.2f}x", flush=True)


def main() -> None:
    """Run all comparisons on the preset `tiny`."""
    torch.manual_seed(0)
    model = RMKV(load_config(preset_path("tiny")).model)
    S = model.config.segment_length
    text = torch.randint(model.config.vocab_size, (1, 16 * 8 * S))

    config = model.config
    shapes = {
        "with slots and two stores": {},
        "with slots, two stores, store_features 2": {"store_features": 2},
        "slots never updated, two stores": {"update": "none"},
        "slots, one store": {"store": 1},
        "slots, a store in each layer": {"store": config.num_hidden_layers},
        "slots, no store": {"store": 0},
        "no memory": {"slots": 0, "store": 0},
    }
    models = {
        name: RMKV(config.model_copy(update={"memory": config.memory.model_copy(update=shape)}))
        for name, shape in shapes.items()
    }
    batch = text[:, : 16 * 4 * S].view(16, -1)

    def read(model: RMKV) -> Callable[[], object]:
        return torch.inference_mode()(lambda: model(batch))

    def learn(model: RMKV) -> Callable[[], object]:
        def step() -> None:
            row_loss(model, batch, batch, torch.zeros_like(batch), model.initial_state(16))[0].backward()

        return step

    compare("Reading, by what is carried", batch.numel(), {name: read(m) for name, m in models.items()})
    compare("Training, by what is carried", batch.numel(), {name: learn(m) for name, m in models.items()})

    rows = text.view(16, -1)
    zeros = torch.zeros_like(rows)

    def replay() -> None:
        row_loss(model, rows, rows, zeros, model.initial_state(16))[0].backward()

    def keep() -> None:
        logits, _ = model(rows, document_ids=zeros)
        F.cross_entropy(logits.flatten(0, 1), rows.flatten()).backward()

    compare("Training on rows of 8 segments", rows.numel(), {"keeping activations": keep, "replaying segments": replay})


if __name__ == "__main__":
    main()
