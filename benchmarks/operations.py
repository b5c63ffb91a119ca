"""Operations that PyTorch is asked for: per layer and segment of a training step, and per layer of a decoding step.

python benchmarks/operations.py
python benchmarks/operations.py --shape tiny --precision fp32 --names
python benchmarks/operations.py --source ../old    # beside another checkout of this repository

Counted is each call that reaches a kernel, after PyTorch has taken its composite operations apart; on a GPU it starts
one kernel or more. Not counted are views (results that share the memory of an argument), reads of metadata, and memory
that nothing is written to. What is outside the layers and segments cancels out: a layer costs the difference between
models of 3 and 2 layers, a segment the difference between rows of 3 and 2 segments.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from work import SHAPES, config_of, make_decoder, make_trainer

from rmkv_cli.config import Config
from rmkv_cli.model import RMKV

EMPTY = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
STORES = {"layer with a store": 1024, "layer without a store": 0}  # stores in all layers, or in none
Operations = dict[str, Counter[str]]  # of each part of the work, by name


class Count(TorchDispatchMode):
    """Counts operations by name, those of the backward pass apart from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or the parts of a composite one, and count it."""
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if not is_free(func):
            in_backward = torch._C._current_graph_task_id() != -1
            (self.backward if in_backward else self.forward)[str(func)] += 1
        return func(*args, **kwargs)


def is_free(func: Any) -> bool:
    """Return whether an operation starts no kernel: a view, a read of metadata, or memory without content."""
    schema = func._schema
    if schema.name.removeprefix("aten::") in EMPTY:
        return True
    if any(x.alias_info is not None and x.alias_info.is_write for x in schema.arguments):
        return False
    return all(x.alias_info is not None for x in schema.returns if "Tensor" in str(x.type))


def training(config: Config, segments: int) -> Operations:
    """Return the operations of a training step on two rows of so many segments."""
    counts = []
    for replay in (True, False):
        rows = {"batch_size": 2, "micro_batch_size": 2, "optimizer": "adamw"}  # the fastest to count
        train = config.train.model_copy(update=rows | {"replay": replay})
        trainer = make_trainer(config.model_copy(update={"train": train}))
        with Count() as count:
            trainer.train_step(segments)
        counts.append(count)
    replayed, kept = counts
    return {
        "forward": replayed.forward,
        "replay": _difference(replayed.backward, kept.backward),
        "backward": kept.backward,
    }


def decoding(config: Config) -> Operations:
    """Return the operations of a decoding step of two texts, in float32."""
    decoder = make_decoder(RMKV(config.model).eval(), 2)
    with Count() as count:
        decoder.step(torch.zeros(2, dtype=torch.int64))
    return {"decoding": count.forward}


def table(shapes: list[str], precisions: list[str], names: bool) -> dict[str, dict[str, int]]:
    """Return the operations of these shapes, training in these precisions: rows, each with its parts."""
    rows: dict[str, Operations] = {}
    for shape in shapes:
        for precision in precisions:

            def segment(**model: Any) -> Operations:
                config = config_of(shape, precision, **model)  # noqa: B023 - called in this round only
                return _minus(training(config, 3), training(config, 2))

            rows |= {f"{shape} {precision}, segment: {row}": found for row, found in layers(shape, segment).items()}

        def step(**model: Any) -> Operations:
            return decoding(config_of(shape, **model))  # noqa: B023

        rows |= {f"{shape}, token: {row}": found for row, found in layers(shape, step).items()}
    if names:
        return {f"{row}, {part}": dict(+n) for row, parts in rows.items() for part, n in parts.items()}
    return {row: {part: n.total() for part, n in parts.items()} for row, parts in rows.items()}


def layers(shape: str, count: Callable[..., Operations]) -> dict[str, Operations]:
    """Return the operations of each kind of layer, of the shape's model, and of what is outside its layers."""
    found = {}
    for name, stores in STORES.items():
        deep, flat = (count(num_hidden_layers=n, memory={"store": stores}) for n in (3, 2))
        found[name] = _minus(deep, flat)
    model = config_of(shape).model
    inside = [found[name] for name in STORES]
    number = model.stores, model.num_hidden_layers - model.stores
    whole = outside = count()
    for layer, times in zip(inside, number, strict=True):
        for _ in range(times):
            outside = _minus(outside, layer)
    return found | {"outside layers": outside, f"all {number[0]} + {number[1]} layers and outside": whole}


def _difference(a: Counter[str], b: Counter[str]) -> Counter[str]:
    result = Counter(a)
    result.subtract(b)
    return result


def _minus(a: Operations, b: Operations) -> Operations:
    return {part: _difference(a[part], b[part]) for part in a}


def main() -> None:
    """Print the operations of this checkout, and those of another one before them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="another checkout, which is counted, too")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--names", action="store_true", help="list the operations by name")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    here = table(options.shape, options.precision, options.names)
    if options.json:
        print(json.dumps(here))
        return
    there: dict[str, dict[str, int]] = {}
    if options.source:
        command = [sys.executable, __file__, "--json", "--shape", *options.shape]
        command += ["--precision", *options.precision, *(["--names"] if options.names else [])]
        environment = os.environ | {"PYTHONPATH": str(options.source.resolve())}
        there = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    for row, parts in here.items():
        before = there.get(row, {})
        print(row)
        for part in sorted(before | parts, key=lambda part: -parts.get(part, 0)) if options.names else parts:
            _print(part, parts.get(part, 0), before.get(part))
        if len(parts) > 1:
            _print("all", sum(parts.values()), sum(before.values()) if before else None)


def _print(part: str, now: int, before: int | None) -> None:
    then = "" if before is None else f"{before:>6} before, {now / before if before else 1:.2f} times as many now"
    print(f"  {part:<44} {now:>6}{then}")


if __name__ == "__main__":
    main()
