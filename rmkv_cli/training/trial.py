"""Trial steps in a temporary folder, like a run's: to estimate the cost of a run, and to profile it."""

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
from rmkv_cli.training.disk import checkpoint_bytes, free_bytes, remaining_checkpoints
from rmkv_cli.training.distribution import Ranks, resolve_device
from rmkv_cli.training.folder import check_run
from rmkv_cli.training.memory import estimated_memory, memory_errors_explained, peak_memory, require_memory
from rmkv_cli.training.optimizer import longest_rows, mean_segments, most_segments
from rmkv_cli.training.teacher import require_tokenizer_of_teacher, with_teacher
from rmkv_cli.training.trainer import Trainer, make_trainer

WARM_UP = 3  # steps before profiling
TOP_OPERATIONS = 10  # operations in the report


def dry_run(config: Config, run: Path, *, price: float | None = None, allow_noncausal: bool = False) -> dict[str, Any]:
    """Check everything that a run in the folder `run` needs, take two steps, and return the run's estimated cost.

    The first step has the run's longest rows, to measure memory. The second has rows of the run's mean length, to
    measure speed. No files remain.

    Args:
        config: the run's config.
        run: the run's folder.
        price: price per hour, to include the total price.
        allow_noncausal: whether the model may be non-causal.

    Raises:
        UserError: the run could not begin.
        BadStepError: one of the two steps is bad.
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
        "disk_bytes": {"needed": remaining_checkpoints(config, run) * checkpoint, "free": free_bytes(run)},
    }


def profile(config: Config, run: Path, steps: int, *, allow_noncausal: bool = False) -> dict[str, Any]:
    """Profile `steps` steps with rows of the run's mean length; return the trace's path and the slowest operations.

    Each step has a single micro-batch, because a trace of many would fill the memory; with roll-outs, whose answers
    come in groups, it has all. The trace, run/profile/trace.json.gz, is for chrome://tracing or ui.perfetto.dev. The
    folder can already contain a run, and a run can begin in it later. Operations are reported with calls and
    milliseconds per step, excluding nested operations, on the GPU if there is one.

    Raises:
        UserError: there is already a profile, or the run could not begin.
    """
    folder = run / "profile"
    require_new(folder)
    config = check_run(config, run, resume=(run / "config.toml").exists(), allow_noncausal=allow_noncausal)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # keeps the profiler from writing to stderr
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
    with atomic_directory(folder) as temporary:
        profiler.export_chrome_trace(str(temporary / "trace.json.gz"))
    operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    times = [(event.self_device_time_total if gpu else event.self_cpu_time_total, event) for event in operations]
    total = sum(time for time, _ in times)
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
                "share": time / total,
            }
            for time, event in slowest
        ],
    }


def _segments(trainer: Trainer) -> tuple[int, float]:
    """Return the maximum and the mean number of segments per row; with a teacher, at most those of rows that it
    reads."""
    train, phases = trainer.config.train, trainer.phases
    most, mean = most_segments(train, phases), mean_segments(train, phases)
    if trainer.objective.teacher is not None:
        with_teacher = most_segments(train, phases, with_teacher=True)
        most, mean = min(most, with_teacher), min(mean, with_teacher)
    return most, mean


@contextmanager
def _trial(config: Config) -> Iterator[Trainer]:
    """Yield a trainer at its first step, with its data in a temporary folder."""
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
                raise UserError(f"{end}, before the trial steps were complete; give more data") from None
