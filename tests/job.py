"""Jobs of several processes, for tests. Run by torchrun, this file is `rmkv` with the changes that a test requests."""

import itertools
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist

from rmkv_cli.cli.main import main
from rmkv_cli.data.lanes import Lanes
from rmkv_cli.errors import UserError
from rmkv_cli.training import distribution, loop, objective, trainer
from rmkv_cli.training.faults import StepMonitor
from rmkv_cli.training.loss import row_loss
from rmkv_cli.training.trainer import Trainer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=5", "--nproc-per-node"]


def torchrun(ranks, *arguments, **wishes):
    """Run `rmkv` with these arguments on a number of ranks; return the finished process with its output as text."""
    command = [*TORCHRUN, str(ranks), "--", __file__, *map(str, arguments)]
    environment = os.environ | {name: str(value) for name, value in wishes.items()}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def ranks(forker, count, *arguments, **wishes):
    """Run `rmkv` as `torchrun` does, in forks and without the launcher, which ends the others if one of them fails.

    The exit code is that of the first to fail.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True} | wishes
    with TemporaryDirectory() as folder:
        files = [{"out": Path(folder) / f"out{rank}", "err": Path(folder) / f"err{rank}"} for rank in range(count)]
        processes = [
            forker.start("job:run", *arguments, **file, **shared, RANK=rank, LOCAL_RANK=rank)
            for rank, file in enumerate(files)
        ]
        failed = 0
        while None in (codes := [process.poll() for process in processes]):
            if failed := failed or next(filter(None, codes), 0):
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        out, err = ("".join(file[kind].read_text() for file in files) for kind in ("out", "err"))
    return subprocess.CompletedProcess(arguments, abs(failed or next(filter(None, codes), 0)), out, err)


def apply_requested_changes():
    """Make the changes to this process that its environment requests.

    FLOAT64: compute in it. ROWS: a folder for the rows that each rank trains on. STOP and POISON: "RANK STEP", when one
    of them gets a SIGTERM, or a loss that is not a number. ALARM: a rank that finds every step after the first bad.
    BROKEN: a rank that cannot read its part of the held-out documents. TIMEOUT: its seconds. LATE: those by which
    rank 0 is late once with data, once with a checkpoint, and once with a sample. FROZEN: rank 0 stops for ever, as a
    dead machine does, when it is to write its first checkpoint.
    """
    if os.environ.get("BROKEN") == os.environ["RANK"]:
        trainer.read_losses = broken
    if "TIMEOUT" in os.environ:
        distribution.TIMEOUT = timedelta(seconds=float(os.environ["TIMEOUT"]))
    if "LATE" in os.environ:
        for place, name in ((Lanes, "next"), (loop, "write_model"), (loop, "write_sample")):
            setattr(place, name, late(getattr(place, name), float(os.environ["LATE"])))
    if "FROZEN" in os.environ:
        loop.write_model = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    if "FLOAT64" in os.environ:
        torch.set_default_dtype(torch.float64)
    if "ROWS" in os.environ:
        read = Trainer._read

        def noted(self, length, then):
            rows, counted = read(self, length, then)
            path = Path(os.environ["ROWS"]) / f"{self.step:03d}-{self.ranks.rank}.npy"
            np.save(path, rows.numpy())
            return rows, counted

        Trainer._read = noted
    if "STOP" in os.environ:
        rank, last = map(int, os.environ["STOP"].split())
        step = Trainer.train_step

        def stopped(self):
            if (self.ranks.rank, self.step + 1) == (rank, last):
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self)

        Trainer.train_step = stopped
    if os.environ.get("ALARM") == os.environ["RANK"]:
        StepMonitor.find_fault = lambda self, loss, norm: "an alarm" if self.norms or self.bad_steps else None
    if "POISON" in os.environ:
        bad_rank, bad_step = map(int, os.environ["POISON"].split())
        calls = itertools.count(1)

        def poisoned(*row, **how):
            value, state = row_loss(*row, **how)
            bad = int(os.environ["RANK"]) == bad_rank and next(calls) == 2 * bad_step  # of two micro-batches a step
            return value * float("nan" if bad else 1), state

        objective.row_loss = poisoned


def broken(*_, **__):
    raise UserError("document 3 of the data is damaged")


def late(function, seconds):
    """Return a function that sleeps before its first call."""
    sleep = cache(time.sleep)

    def delayed(*arguments, **keys):
        sleep(seconds)
        return function(*arguments, **keys)

    return delayed


def run():
    apply_requested_changes()
    main()


if __name__ == "__main__":
    run()
