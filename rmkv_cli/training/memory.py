"""Memory of the machine or GPU: estimate, check and explain what training needs."""

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

GPU_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_errors_explained(config: Config) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into `UserError` with advice."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)  # only PyTorch's CUDA allocator has its own exception class
        gpu = isinstance(error, torch.OutOfMemoryError) or any(line in message for line in GPU_OUT_OF_MEMORY)
        if not gpu and "DefaultCPUAllocator" not in message:
            raise
        raise UserError(
            f"the {'GPU' if gpu else 'machine'}'s memory is full: lower train.micro_batch_size "
            f"({config.train.micro_batch_size}), or model.segment_length; `rmkv params` estimates the need"
        ) from None


def estimated_memory(config: Config, segments: int, device: str, ranks: int = 1) -> int:
    """Return the estimated bytes that training on rows of `segments` segments takes on each rank's device."""
    share = config.train.model_copy(update={"batch_size": config.train.batch_size // ranks})
    memory = training_memory(config.model, share, share.micro_batch_size, segments * config.model.segment_length)
    return memory.total + memory.set_aside * (device == "cpu")


def peak_memory(device: str) -> int:
    """Return the peak memory of this process so far, in bytes; on a GPU, that of tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_memory(config: Config, segments: int, device: str, ranks: int = 1) -> None:
    """Raise `UserError` if training on rows of `segments` segments needs more memory than a CPU has.

    On a GPU, which fails by itself when its memory is full, only warn: the longest rows may come after days.
    """
    needed, available = estimated_memory(config, segments, device, ranks), total_memory(device)
    if device == "cpu":  # training continues while a copy of its state is written to a checkpoint
        needed += checkpoint_bytes(config)
    if needed <= available:
        return
    line = (
        f"training needs about {needed / 1e9:,.1f} GB of memory, but the device has {available / 1e9:,.1f} GB: lower "
        f"train.micro_batch_size ({config.train.micro_batch_size}), or choose a smaller model"
    )
    if device == "cpu":
        raise UserError(line)
    stderr().print(f"warning: {line}", style="bold red")
