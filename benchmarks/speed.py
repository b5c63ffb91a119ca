"""Ratios of times, each pair measured in turns within one run: does a long context cost more, what does replay cost?

python benchmarks/speed.py
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.model import RMKV, State
from rmkv_cli.training.loss import row_loss

ROUNDS = 7


def compare(title: str, unit: int, work: dict[str, Callable[[], object]]) -> None:
    """Print each work's rate in tokens per second, `unit` tokens a call, and its ratio to the first one's."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    rates = {name: unit / median(seconds[1:]) for name, seconds in times.items()}  # the first round warms up
    print(title)
    for name, rate in rates.items():
        print(f"  {name:<32} {rate:>9,.0f} tokens/s   {rate / next(iter(rates.values())):.2f}x")


def decode(model: RMKV, state: State, tokens: int) -> Callable[[], object]:
    """Return a call that writes so many tokens from the state."""

    @torch.inference_mode()
    def call() -> None:
        at, token = state, torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(tokens):
            logits, at = model(token, at)
            token = logits[:, -1:].argmax(-1)

    return call


def main() -> None:
    """Run all comparisons on the preset `tiny`."""
    torch.manual_seed(0)
    model = RMKV(load_config(preset_path("tiny")).model)
    S = model.config.segment_length
    text = torch.randint(model.config.vocab_size, (1, 65536 + 1))

    states, state = {}, None
    with torch.inference_mode():
        for start, stop in ((0, 1024), (1024, 8192), (8192, 65536)):
            _, state = model.hidden(text[:, start:stop], state)
            states[f"after {stop:,} tokens of context"] = state
    compare("Writing, by length of the context", S, {name: decode(model, s, S) for name, s in states.items()})

    @torch.inference_mode()
    def recompute() -> None:
        for length in range(1024, 1024 + 4):
            model.head(model.hidden(text[:, :length])[0][:, -1])

    works = {"going on from the state": decode(model, states["after 1,024 tokens of context"], 4)}
    compare("Writing at 1,024 tokens", 4, works | {"reading the text again each time": recompute})

    config = model.config
    shapes = {
        "with slots and store": {},
        "slots never updated, store": {"update": "none"},
        "slots, no store": {"store": False},
        "no memory": {"slots": 0, "store": False},
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

    rows = text[:, : 16 * 8 * S].view(16, -1)
    zeros = torch.zeros_like(rows)

    def replay() -> None:
        row_loss(model, rows, rows, zeros, model.initial_state(16))[0].backward()

    def keep() -> None:
        logits, _ = model(rows, document_ids=zeros)
        F.cross_entropy(logits.flatten(0, 1), rows.flatten()).backward()

    compare("Training on rows of 8 segments", rows.numel(), {"keeping activations": keep, "replaying segments": replay})


if __name__ == "__main__":
    main()
