"""Write and read the tensors, other than weights, that training resumes from; each rank handles its own parts."""

import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from rmkv_cli.errors import UserError

TRAINING = "training"
INDEX = ".metadata"
ALLOWED_IN_INDEX = {
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its module in Python 3.13
    "torch": {"Size", *(str(x).removeprefix("torch.") for x in vars(torch).values() if isinstance(x, torch.dtype))},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.serialization": {"_get_layout"},
}
"""Names, by module, that PyTorch's pickled index may contain. They describe tensors and run no code."""


def begin_writing(directory: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> "Future[Any]":
    """Copy tensors to the CPU and start to write them into a model folder; all ranks call this, each with its parts.

    Args:
        directory: the model folder.
        tensors: the tensors by name.
        group: process group of all ranks for coordination; None for a single process.
    """
    _silence_single_process_warning()
    writer = dcp.FileSystemWriter(directory / TRAINING)
    written = dcp.async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    assert isinstance(written, Future)
    return written


def finish_writing(directory: Path, written: "Future[Any]") -> None:
    """Wait until `begin_writing` has finished; raise `UserError` on all ranks if any rank cannot write."""
    with _one_line(f"{directory / TRAINING}: cannot be written"):
        written.result()


def read_tensors(checkpoint: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, read into tensors from `empty`, a function of name, shape and type.

    Each rank gets the parts that match its empty tensors, however many ranks wrote them. All ranks call this.

    Raises:
        UserError: on all ranks, if the files are damaged or could run code.
    """
    reader = _Reader(checkpoint / TRAINING)
    tensors = {
        name: empty(name, metadata.size, metadata.properties.dtype)
        for name, metadata in reader.read_metadata().state_dict_metadata.items()
        if isinstance(metadata, TensorStorageMetadata)
    }
    _silence_single_process_warning()
    with _one_line(f"{checkpoint / TRAINING}: cannot be read"):
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors


class _Unpickler(pickle.Unpickler):
    """An unpickler that accepts only the names in ALLOWED_IN_INDEX."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in ALLOWED_IN_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    """Return a member of the index's only enumeration, which Python 3.11.0 to 3.11.3 pickle as a call of getattr."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it asks for '{name}' of {kind!r}, which could run code")
    return kind[name]


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader of tensors, except that unpickling the index runs no code."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                index = _Unpickler(file).load()
            if not isinstance(index, Metadata):
                raise pickle.UnpicklingError(f"it contains a {type(index).__name__}")
            self._require_room(index)
        except Exception as error:  # a damaged pickle can raise any exception
            raise UserError(f"{path}: is damaged, or not an index that rmkv wrote: {error}") from None
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index

    def _require_room(self, index: Metadata) -> None:
        """Raise `ValueError`, before allocation, if the index describes more bytes than the files have."""
        available = sum(path.stat().st_size for path in Path(self.path).glob("*.distcp"))
        for name, found in index.state_dict_metadata.items():
            if isinstance(found, TensorStorageMetadata):
                available -= math.prod(found.size) * found.properties.dtype.itemsize
                if available < 0 or min(found.size, default=0) < 0:
                    raise ValueError(f"'{name}' has the shape {tuple(found.size)}, which the files do not contain")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn a failure of any rank in distributed checkpointing into a one-line `UserError` on all ranks."""
    try:
        yield
    except dcp.CheckpointException as failed:
        error = next(error for error, _ in failed.failures.values())
        if not isinstance(error, Exception):  # a second signal
            raise error from None
        raise UserError(f"{what}: {(str(error) or repr(error)).splitlines()[0]}") from failed


def _silence_single_process_warning() -> None:
    """Ignore PyTorch's warning about a single process, globally: thread-local filters need Python 3.14."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
