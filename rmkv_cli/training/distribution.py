"""The processes (ranks) of a training job: their identity, their communication, and sharded tensors."""

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
"""Longest wait for other ranks in a collective operation, and for the next heartbeat of rank 0.

It is PyTorch's default for NCCL. Compiling, stepping and writing checkpoints differ by far less between ranks.
"""
UNLIMITED = timedelta(days=365)
HEARTBEATS = "beats"  # key in the store of rank 0's heartbeat counter
GRACE = 5.0  # seconds in which torchrun ends this process if another one has died


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job; by default it is the only process.

    Rank 0 reads data, makes decisions and writes files; the others follow its calls. All ranks call each method
    together.
    """

    device: str
    """Type of device, "cpu" or "cuda". The process's own GPU is the current one."""
    rank: int = 0
    """Rank of this process, from 0."""
    count: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Rank among the processes on this machine."""
    mesh: DeviceMesh | None = None
    """One-dimensional mesh of all ranks; None for a single process."""
    messages: dist.ProcessGroup | None = None
    """Group of all ranks for messages of rank 0. The others wait for them as long as its heartbeat continues."""
    saving: dist.ProcessGroup | None = None
    """Group of all ranks for the thread that writes checkpoints."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """Return rank 0's value on all ranks."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.messages)
        return box[0]

    def scatter(self, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return this rank's part of a CPU tensor that rank 0 provides, split along dimension 1.

        Args:
            x: the tensor on rank 0, None on others.
            shape: shape of the part.
            dtype: type of the tensor.
        """
        if self.count > 1:
            parts = None if x is None else [part.contiguous() for part in x.chunk(self.count, dim=1)]
            x = torch.empty(*shape, dtype=dtype, pin_memory=self.device == "cuda")
            dist.scatter(x, parts, src=0)
        assert x is not None
        return x

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0; other ranks get only their own."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.first else None
        dist.gather_object(value, values, dst=0)
        return values or [value]

    def maximum(self, *numbers: int) -> list[int]:
        """Return the maximum over all ranks of each argument."""
        if self.count == 1:
            return list(numbers)
        box = torch.tensor(numbers)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def sum(self, x: Tensor) -> Tensor:
        """Sum the ranks' tensors of equal shape in place, and return the sum."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def sum_all(self, tensors: list[Tensor]) -> None:
        """Sum the ranks' lists of tensors elementwise in place, with all reductions in flight at once."""
        if self.count > 1:
            for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
                work.wait()

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Raise `UserError` on all ranks if any rank raises one in the block, which must not communicate."""
        raised = None
        try:
            yield
        except UserError as error:
            raised = error
        errors = [raised] * self.count
        if self.count > 1:
            dist.all_gather_object(errors, raised)
        for first in filter(None, errors):
            raise first

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Return the tensor that consists of the ranks' `x` along a dimension."""
        return x if self.mesh is None else DTensor.from_local(x.contiguous(), self.mesh, [Shard(dim)])


def resolve_device(device: str) -> str:
    """Return "cuda" or "cpu"; raise `UserError` if a GPU is requested but unavailable."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': PyTorch finds no GPU on this machine; use 'auto' or 'cpu'")
    return device


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes of a torchrun job, if there is one, and leave at the end.

    Rank 0 may write a checkpoint, sample, or wait for data for any length of time while the others wait for its
    message. A heartbeat shows that it is alive; if it stops for TIMEOUT, the others end, even if no connection broke.

    If another process dies, operations here fail, or on GPUs hang. This process then waits for torchrun to end it, so
    that torchrun sees only the process that failed by itself, and names it.

    Raises:
        UserError: there is no such device, or there are fewer devices than processes.
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
                f"rank {rank}: this machine has {torch.cuda.device_count()} GPUs; start at most one process per GPU"
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
        if not isinstance(error, torch.OutOfMemoryError):  # a failure of this process itself
            time.sleep(GRACE)
        raise
    finally:
        ended.set()
        if device == "cpu" or not failed:  # otherwise NCCL might wait for ranks that are gone
            dist.destroy_process_group()


def _send_heartbeats(store: dist.Store, ended: threading.Event) -> None:
    """Send the heartbeat of rank 0 until the end."""
    while not ended.wait((TIMEOUT / 20).total_seconds()):
        store.add(HEARTBEATS, 1)


def _watch_heartbeats(store: dist.Store, ended: threading.Event) -> None:
    """End this process, a rank other than 0, if the heartbeat of rank 0 stops for TIMEOUT."""
    last = -1
    while not ended.wait(TIMEOUT.total_seconds()):
        try:
            beats = store.add(HEARTBEATS, 0)
        except dist.DistError:  # the store has gone with rank 0
            beats = last
        if beats == last:
            line = f"error: rank 0 has not responded for {TIMEOUT}; check its machine, then resume with --resume"
            stderr().print(line, style="red")
            os._exit(1)
        last = beats


def require_even_shares(batch_size: int, micro_batch_size: int, ranks: int) -> None:
    """Raise `UserError` unless each rank gets the same number of whole micro-batches."""
    if batch_size % (ranks * micro_batch_size):
        raise UserError(
            f"train.batch_size = {batch_size} is not a multiple of train.micro_batch_size = {micro_batch_size} times "
            f"{ranks} processes; change one of them"
        )


def full_tensor(x: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded; if it is, all ranks call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_part(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded_like(x: Tensor, other: Tensor) -> Tensor:
    """Return x, which is whole on each rank, sharded like another tensor."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)
