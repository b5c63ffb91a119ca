"""The processes of one training job: which of them this one is, what they tell each other, how they share a model."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other where all arrive together; where rank 0 may be late, for its next sign of life.

Ranks differ by far less when they compile, step, or write their part of a checkpoint. PyTorch's own limit for NCCL.
"""
UNLIMITED = timedelta(days=365)
HEARTBEATS = "beats"  # rank 0's signs of life, counted in the store
GRACE = 5.0  # seconds in which torchrun ends this process, if another one is dead


@dataclass(frozen=True)
class Ranks:
    """Which of the job's processes this one is; by default its only one.

    Rank 0 reads the data, decides and writes; the others wait for what it tells them. A call of a method is one of all
    ranks.
    """

    device: str
    """"cpu" or "cuda"; of several GPUs, the process's own is the current one."""
    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among those on this machine."""
    mesh: DeviceMesh | None = None
    """All ranks, in a row; None if there is but one."""
    messages: dist.ProcessGroup | None = None
    """All ranks again, for messages of rank 0, for which the others wait as long as it gives signs of life."""
    saving: dist.ProcessGroup | None = None
    """All ranks once more, for the thread that writes a checkpoint."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """Return rank 0's value."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.messages)
        return box[0]

    def scatter(self, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return this rank's part, of this shape and type, of a tensor on the CPU that rank 0 alone gives.

        The parts are cut along dimension 1.
        """
        if self.count > 1:
            parts = None if x is None else [part.contiguous() for part in x.chunk(self.count, dim=1)]
            x = torch.empty(*shape, dtype=dtype, pin_memory=self.device == "cuda")
            dist.scatter(x, parts, src=0)
        assert x is not None
        return x

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0, and this one's alone on the others."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.first else None
        dist.gather_object(value, values, dst=0)
        return values or [value]

    def maximum(self, *numbers: int) -> list[int]:
        """Return the largest of the ranks' numbers, for each of the arguments."""
        if self.count == 1:
            return list(numbers)
        box = torch.tensor(numbers)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def sum(self, x: Tensor) -> Tensor:
        """Add up the ranks' tensors, which are of one shape, in place; return the sum."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def sum_all(self, tensors: list[Tensor]) -> None:
        """Add up the ranks' tensors, of which all have as many, in place and side by side."""
        if self.count > 1:
            for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
                work.wait()

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Raise `UserError` on all ranks if any rank raises one inside, where no rank waits for another."""
        own = None
        try:
            yield
        except UserError as error:
            own = error
        errors = [own] * self.count
        if self.count > 1:
            dist.all_gather_object(errors, own)
        for first in filter(None, errors):
            raise first

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Return the tensor whose parts along a dimension, one a rank, are the ranks' `x`."""
        return x if self.mesh is None else DTensor.from_local(x.contiguous(), self.mesh, [Shard(dim)])


def resolve_device(device: str) -> str:
    """Return "cuda" or "cpu"; raise `UserError` if a GPU is asked for and none can be used."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': PyTorch finds no GPU here; use 'auto' or 'cpu'")
    return device


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started with this one, if it did, until the end.

    Rank 0 may write a checkpoint, sample, or wait for data for any length of time while the others wait for its
    message. It gives signs of life meanwhile; without them for TIMEOUT the others end, even if no connection broke.

    Should another one die, what this one waits for fails, or on GPUs goes on waiting. It then waits to be ended by
    torchrun, which so finds one process alone that failed by itself, and names it.

    Raises:
        UserError: there is no such device, or not one for each process.
    """
    device = resolve_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1:
        yield Ranks(device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank}: no GPU is left for it, as this machine has {torch.cuda.device_count()}; "
                f"start one process a GPU"
            )
        torch.cuda.set_device(local_rank)
    store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    ended = threading.Event()
    threading.Thread(target=_watch_heartbeats if rank else _send_heartbeats, args=(store, ended), daemon=True).start()
    failed = False
    try:
        messages = dist.new_group(backend="gloo", timeout=UNLIMITED)
        saving = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield Ranks(device, rank, count, local_rank, init_device_mesh(device, (count,)), messages, saving)
    except RuntimeError as error:
        failed = True
        if not isinstance(error, torch.OutOfMemoryError):  # which is this one's own fault
            time.sleep(GRACE)
        raise
    finally:
        ended.set()
        if device == "cpu" or not failed:  # else NCCL might wait for what the others do not do any more
            dist.destroy_process_group()


def _send_heartbeats(store: dist.Store, ended: threading.Event) -> None:
    """Give signs of life, as rank 0, until the end."""
    while not ended.wait((TIMEOUT / 20).total_seconds()):
        store.add(HEARTBEATS, 1)


def _watch_heartbeats(store: dist.Store, ended: threading.Event) -> None:
    """End this process, as another rank than 0, should rank 0 give no sign of life for TIMEOUT."""
    heard = -1
    while not ended.wait(TIMEOUT.total_seconds()):
        try:
            beats = store.add(HEARTBEATS, 0)
        except dist.DistError:  # the store itself is gone
            beats = heard
        if beats == heard:
            line = f"error: rank 0 has given no sign of life for {TIMEOUT}; check its machine, then use --resume"
            stderr().print(line, style="red")
            os._exit(1)
        heard = beats


def require_even_shares(batch_size: int, micro_batch_size: int, ranks: int) -> None:
    """Raise `UserError` unless each rank gets the same number of whole micro-batches."""
    if batch_size % (ranks * micro_batch_size):
        raise UserError(
            f"train.batch_size = {batch_size} is not a multiple of train.micro_batch_size = {micro_batch_size} times "
            f"{ranks} processes; change one of them"
        )


def whole(x: Tensor) -> Tensor:
    """Return a tensor that may be in parts on the ranks as one; if it is, all ranks call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def part(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be in parts on the ranks."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded_like(x: Tensor, other: Tensor) -> Tensor:
    """Return x, whole on each rank, in parts as the other tensor is."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)
