"""Training speed by number of threads and how they wait for each other, beside processes that keep a core busy.

python benchmarks/threads.py
python benchmarks/threads.py --busy 0 1 --rounds 9

Each worker process trains the preset `tiny` with its own OMP_NUM_THREADS and OMP_WAIT_POLICY. They take turns, a step
each, so that other work on the machine slows all of them alike; the waiting ones are stopped. Prints a Markdown table
with the median tokens per second and, in parentheses, per second of CPU time, which waiting threads that spin use up.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from statistics import median

THREADS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads, no policy": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "2 threads, active": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"},
}
ROWS, SEGMENTS = 8, 2


def work() -> None:
    """Take a training step for each line of standard input; print its tokens per second, and per second of CPU time."""
    import torch

    from rmkv_cli.config import load_config, preset_path
    from rmkv_cli.model import RMKV
    from rmkv_cli.training.loss import row_loss
    from rmkv_cli.training.optimizer import make_optimizers

    torch.manual_seed(0)
    config = load_config(preset_path("tiny"))
    model = RMKV(config.model)
    optimizers = make_optimizers(model, config.train)
    rows = torch.randint(config.model.vocab_size, (ROWS, SEGMENTS * config.model.segment_length))
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        row_loss(model, rows, rows, torch.zeros_like(rows), model.initial_state(ROWS))[0].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        n = rows.numel()
        print(n / (time.perf_counter() - wall), n / (time.process_time() - cpu), flush=True)


def start_worker(settings: dict[str, str]) -> "subprocess.Popen[str]":
    """Return a new process that takes a step for each line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--work"]
    return subprocess.Popen(
        command, env=environment | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def step(worker: "subprocess.Popen[str]") -> tuple[float, ...]:
    """Let a worker take a step, then stop it, because its threads may spin; return the two rates that it prints."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.send_signal(signal.SIGCONT)
    print(file=worker.stdin, flush=True)
    rates = tuple(map(float, worker.stdout.readline().split()))
    worker.send_signal(signal.SIGSTOP)
    return rates


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="processes beside it")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each worker")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    workers = {name: start_worker(settings) for name, settings in THREADS.items()}
    for worker in workers.values():
        step(worker)  # warms up
    print(f"| beside N busy processes | {' | '.join(THREADS)} |\n| --- |{' --- |' * len(THREADS)}", flush=True)
    for busy in options.busy:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        rounds = [[step(worker) for worker in workers.values()] for _ in range(options.rounds)]
        for other in others:
            other.kill()
            other.wait()
        medians = [[median(rates) for rates in zip(*steps, strict=True)] for steps in zip(*rounds, strict=True)]
        print(f"| {busy} | {' | '.join(f'{wall:,.0f} ({cpu:,.0f})' for wall, cpu in medians)} |", flush=True)
    for worker in workers.values():
        worker.kill()


if __name__ == "__main__":
    main()
