"""Time this checkout beside another one: training steps, decoding, reading a prompt, and sampling.

python benchmarks/versions.py ../old
python benchmarks/versions.py ../old --works "train tiny" "decode wide" --rounds 15

Each checkout works in a process of its own; the two take turns, and the ratio of their median times is printed. A
training step is the trainer's own, optimizer included, on rows of 4 segments. `wide` is a model of width 384 with
segments of 512 tokens; `deep` has the shape of SmolLM2-135M as an RMKV. `compiled` decodes as `--compile` does; the
last columns are the seconds of the first call, which compiles. A checkout that cannot decode in bfloat16 does so in
float32. Sampling takes 64 tokens of each text from random logits: with the default settings, which include top-p, with
temperature alone (`all`), and greedily.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from work import SHAPES, config_of, make_batch, make_decoder, make_trainer

from rmkv_cli.model import RMKV, inference

try:
    from rmkv_cli.model.precision import to_precision
except ImportError:  # an older checkout, which has float32 alone
    to_precision = None  # type: ignore[assignment]

SEGMENTS = 4  # of a training row
PROMPT = 8  # segments of a prompt
TOKENS = 64  # decoded at a time
SAMPLINGS: dict[str, dict[str, float]] = {"default": {}, "all": {"top_p": 1}, "greedy": {"temperature": 0}}
VOCABULARY = 16_384  # of sampling
WORKS = [
    *(f"train {shape} {precision}" for shape in SHAPES for precision in ("fp32", "bf16")),
    *(
        kind.format(shape) + dtype
        for kind in ("decode {} x1", "decode {} x16", "prompt {}")
        for shape in SHAPES
        for dtype in ("", " bf16")
    ),
    *("decode deep x1 bf16", "compiled tiny x1", "compiled deep x1 bf16"),
    *(f"sample {sampling} x{lanes}" for sampling in SAMPLINGS for lanes in (1, 16)),
]


def prepare(work: str) -> Callable[[], object]:
    """Return the work as a function."""
    kind, shape, *rest = work.split()
    if kind == "train":
        trainer = make_trainer(config_of(shape, *rest))
        return lambda: trainer.train_step(SEGMENTS)
    if kind == "sample":
        batch = make_batch(int(rest[0][1:]), VOCABULARY, **SAMPLINGS[shape])
        return lambda: [batch.step() for _ in range(TOKENS)]
    torch.manual_seed(0)
    config = config_of(shape)
    model = RMKV(config.model).eval()
    if rest[-1:] == ["bf16"] and to_precision is not None:
        to_precision(model, torch.bfloat16)
    if kind == "prompt":
        prompt = torch.randint(config.model.vocab_size, (1, PROMPT * config.model.segment_length))

        def read() -> None:
            with inference(model):
                model.head(model.hidden(prompt)[0][:, -1:])

        return read
    lanes = int(rest[0][1:])
    decoder = make_decoder(model, lanes, compiled=kind == "compiled")
    tokens = torch.randint(config.model.vocab_size, (TOKENS, lanes))

    def decode() -> None:
        for each in tokens:
            decoder.step(each)

    return decode


class Worker:
    """A process that works with the code of one checkout."""

    def __init__(self, source: Path, threads: int | None) -> None:
        environment = os.environ | {"PYTHONPATH": str(source.resolve())}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, __file__, "--serve", str(source)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, message: str) -> float:
        """Send the name of a work to prepare, or "" to do it; return the seconds that this took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(message, file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            sys.exit("a worker stopped")
        return float(answer)


def serve() -> None:
    """Answer what `Worker.ask` asks."""
    call: Callable[[], object] | None = None
    for line in sys.stdin:
        began = time.perf_counter()
        if name := line.strip():
            call = None  # frees the memory of the work before
            call = prepare(name)
        else:
            assert call is not None
            call()
        print(time.perf_counter() - began, flush=True)


def main() -> None:
    """Time all works of both checkouts in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the other checkout")
    parser.add_argument("--works", nargs="+", default=[""], metavar="PREFIX", help=f"of: {', '.join(WORKS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of each process [default: as many as PyTorch takes]")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    old, new = (Worker(source, options.threads) for source in (options.old, Path(__file__).parents[1]))
    print(f"{'':<24} {'old':>10} {'new':>10}   old / new   first: old, new")
    for work in WORKS:
        if not work.startswith(tuple(options.works)):
            continue
        times: dict[Worker, list[float]] = {old: [], new: []}
        for worker in times:
            worker.ask(work)
        for _ in range(options.rounds + 2):  # the first two warm up
            for worker, seconds in times.items():
                seconds.append(worker.ask(""))
        before, after = (median(seconds[2:]) for seconds in times.values())
        ratio, first = f"{before / after:>8.2f}x", [f"{seconds[0]:.1f} s" for seconds in times.values()]
        print(f"{work:<24} {1000 * before:>7.1f} ms {1000 * after:>7.1f} ms   {ratio}   {', '.join(first)}", flush=True)


if __name__ == "__main__":
    main()
