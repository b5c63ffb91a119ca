"""The memory that training has, needs and takes."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rmkv_cli.config import Config
from rmkv_cli.errors import UserError
from rmkv_cli.model.cost import training_memory
from rmkv_cli.model.pretrained import total_memory
from rmkv_cli.progress import stderr
from rmkv_cli.training.disk import checkpoint_bytes

GPU_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_errors_explained(config: Config) -> Iterator[None]:
    """Raise `UserError`, which tells how to need less, where torch finds no memory for a tensor."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)  # by no class of its own, but where PyTorch's own allocator is the one that says it
        gpu = isinstance(error, torch.OutOfMemoryError) or any(line in said for line in GPU_FULL)
        if not gpu and "DefaultCPUAllocator" not in said:
            raise
        raise UserError(
            f"the {'GPU' if gpu else 'machine'}'s memory is full: lower train.micro_batch_size "
            f"({config.train.micro_batch_size}), or model.segment_length; `rmkv params` estimates the need"
        ) from None


def estimated_memory(config: Config, segments: int, device: str, ranks: int = 1) -> int:
    """Return the bytes that rows of so many segments need on the device of each of the ranks, which share the lanes."""
    share = config.train.model_copy(update={"batch_size": config.train.batch_size // ranks})
    memory = training_memory(config.model, share, share.micro_batch_size, segments * config.model.segment_length)
    return memory.total + memory.set_aside * (device == "cpu")


def peak_memory(device: str) -> int:
    """Return the most bytes that this process has taken so far, on a GPU those of tensors alone."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_memory(config: Config, segments: int, device: str, ranks: int = 1) -> None:
    """Raise `UserError` if rows of so many segments need more, on each of the ranks, than a CPU's memory.

    Of a GPU's, which tells by itself what does not fit, warn: a training's longest rows may come after days.
    """
    needed, there = estimated_memory(config, segments, device, ranks), total_memory(device)
    if device == "cpu":  # a checkpoint is copied, and written while training continues
        needed += checkpoint_bytes(config)
    if needed <= there:
        return
    line = (
        f"training needs about {needed / 1e9:,.1f} GB of memory, but there are {there / 1e9:,.1f} GB: lower "
        f"train.micro_batch_size ({config.train.micro_batch_size}), or choose a smaller model"
    )
    if device == "cpu":
        raise UserError(line)
    stderr().print(f"warning: {line}", style="bold red")
