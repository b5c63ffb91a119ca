"""Launch several processes of one job on this machine with torchrun's library."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from rmkv_cli.progress import stderr
from rmkv_cli.training.faults import BadStepError

# The job's exit code by the exit code of a process that has reported why it ended.
REPORTED = {2: 2, 130: 130, BadStepError.job_exit_code: 1}


def launch(processes: int, arguments: Sequence[str], run: Path) -> int:
    """Run `rmkv` with these arguments, which train in `run`, as several processes; return the job's exit code.

    If one process dies, all end, and a message names it. SIGINT and SIGTERM are forwarded to all processes. Torchrun
    itself would exit with 1 after a signal, even if every process had saved its work.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # `store`
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # reported below
    job = start_processes(
        "rmkv",
        sys.executable,
        args=dict.fromkeys(range(processes), ("-m", "rmkv_cli", *arguments)),
        envs={rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)},
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )

    def forward_signal(number: int, _: FrameType | None) -> None:
        for pid in job.pids().values():
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward_signal)
    ended = job.wait(period=0.1)
    assert ended is not None
    if not ended.failures:
        return 0
    first = min(ended.failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode in REPORTED:
        return REPORTED[first.exitcode]
    reason = f"killed by {first.signal_name()}" if first.exitcode < 0 else f"exit code {first.exitcode}"
    line = f"error: rank {first.local_rank} failed first ({reason}) and ended the job; resume with: "
    stderr().print(f"{line}rmkv train --resume --run {run} --nproc {processes}", style="red")
    return 1
