"""Steps on trial, as a run would take them but in a temporary folder: for a profile, and for what a run will cost."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from rmkv_cli.config import Config
from rmkv_cli.data.lanes import EndOfData
from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_directory, require_new
from rmkv_cli.model.pretrained import total_memory
from rmkv_cli.progress import progress
from rmkv_cli.training.begin import pending_source, with_source
from rmkv_cli.training.data import open_data
from rmkv_cli.training.disk import checkpoint_bytes, checkpoints_to_come, free_bytes
from rmkv_cli.training.distribution import Ranks, resolve_device
from rmkv_cli.training.folder import check_run
from rmkv_cli.training.memory import estimated_memory, memory_errors_explained, peak_memory, require_memory
from rmkv_cli.training.optimizer import longest_rows, mean_segments, most_segments
from rmkv_cli.training.teacher import require_tokenizer_of_teacher, with_teacher
from rmkv_cli.training.trainer import Trainer, make_trainer

WARM_UP = 3  # steps before those that are profiled
TOP_OPERATIONS = 10  # operations that are told


def dry_run(config: Config, run: Path, *, price: float | None = None, allow_noncausal: bool = False) -> dict[str, Any]:
    """Check all that a run in the folder `run` needs, take two steps, and return what the run will take; leave nothing.

    The first step has the longest rows that the run will have, for the memory's sake. The second, which is timed, has
    rows of the run's mean length. `price` is an hour's, and gives the cost.

    Raises:
        UserError: the run could not begin.
        BadStepError: already one of the two steps is bad.
    """
    config = check_run(config, run, allow_noncausal=allow_noncausal)
    with _trial(config) as trainer:
        train = config.train
        most, mean = _segments(trainer)
        with progress("Two steps", 2, "steps") as advance:
            trainer.train_step(most)
            advance(1)
            rate = trainer.train_step(round(mean))["tokens_per_second"]
            advance(1)
    read = trainer.tokens / 2 if trainer.rollouts else train.batch_size * config.model.segment_length * mean
    hours = train.tokens / rate / 3600
    checkpoint = checkpoint_bytes(config)
    return {
        "parameters": trainer.model.count_parameters(),
        "tokens": train.tokens,
        "steps": round(train.tokens / read),
        "tokens_per_second": rate,
        "hours": hours,
        **({} if price is None else {"cost": hours * price}),
        "memory_bytes": {
            "estimated": estimated_memory(config, most, trainer.device),
            "peak": peak_memory(trainer.device),
            "total": total_memory(trainer.device),
        },
        "checkpoint_bytes": checkpoint,
        "disk_bytes": {"needed": checkpoints_to_come(config, run) * checkpoint, "free": free_bytes(run)},
    }


def profile(config: Config, run: Path, steps: int, *, allow_noncausal: bool = False) -> dict[str, Any]:
    """Profile N steps with rows of the run's mean length; return the trace's path and the most expensive operations.

    A step is of one micro-batch: the others do the same, and a trace of many would fill the memory. With roll-outs,
    whose answers come in groups, it is whole. The trace, for chrome://tracing or ui.perfetto.dev, is
    run/profile/trace.json.gz. Nothing else is left: a run may be there before, and can begin there after. Of an
    operation are told, for each step, calls and milliseconds without
    those of the operations that it calls, on the GPU where there is one.

    Raises:
        UserError: there is a profile already, or a run could not begin.
    """
    folder = run / "profile"
    require_new(folder)
    config = check_run(config, run, resume=(run / "config.toml").exists(), allow_noncausal=allow_noncausal)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler writes notes of its own to stderr
    rows = config.train.batch_size if config.train.rollouts.tasks else config.train.micro_batch_size
    config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": rows})})
    with _trial(config) as trainer:
        segments = round(_segments(trainer)[1])
        gpu = trainer.device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with progress("Profiling", WARM_UP + steps, "steps") as advance:
            for _ in range(WARM_UP):
                trainer.train_step(segments)
                advance(1)
            with torch.profiler.profile(activities=activities) as profiler:
                for _ in range(steps):
                    trainer.train_step(segments)
                    advance(1)
    with atomic_directory(folder) as aside:
        profiler.export_chrome_trace(str(aside / "trace.json.gz"))
    operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    times = [(event.self_device_time_total if gpu else event.self_cpu_time_total, event) for event in operations]
    whole = sum(time for time, _ in times)
    slowest = sorted(times, key=lambda timed: timed[0], reverse=True)[:TOP_OPERATIONS]
    return {
        "trace": str(folder / "trace.json.gz"),
        "steps": steps,
        "rows": rows,
        "segments": segments,
        "operations": [
            {
                "name": event.key,
                "calls": event.count / steps,
                "milliseconds": time / 1000 / steps,
                "share": time / whole,
            }
            for time, event in slowest
        ],
    }


def _segments(trainer: Trainer) -> tuple[int, float]:
    """Return the maximum and the mean number of segments per row; with a teacher, of the rows that it reads."""
    train, phases = trainer.config.train, trainer.phases
    most, mean = most_segments(train, phases), mean_segments(train, phases)
    if trainer.objective.teacher is not None:
        taught = most_segments(train, phases, taught=True)
        most, mean = min(most, taught), min(mean, taught)
    return most, mean


@contextmanager
def _trial(config: Config) -> Iterator[Trainer]:
    """Give a trainer at its first step, whose data keep what they need in a temporary folder."""
    device = resolve_device(config.train.device)
    with tempfile.TemporaryDirectory(prefix="rmkv-") as folder, ExitStack() as stack:
        run = Path(folder)
        config = with_teacher(with_source(config, run))
        data = stack.enter_context(open_data(config, run))
        require_tokenizer_of_teacher(config, data.tokenizer)
        require_memory(config, longest_rows(config, data.phases), device)
        with memory_errors_explained(config):
            try:
                trainer = make_trainer(config, Ranks(device), data)
                if (source := pending_source(config, run)) is not None:
                    trainer.start_from(source)
                yield trainer
            except EndOfData as end:
                raise UserError(f"{end}: too early for a trial, which needs more tokens") from None
