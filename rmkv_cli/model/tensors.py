"""Write safetensors files atomically, and read their headers so that these can be checked before any tensor."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_file, require_file

Layout: TypeAlias = dict[str, tuple[torch.dtype | str, tuple[int, ...]]]
"""Type and shape of each tensor by name; an unsupported type is given by its name in the file."""

CHECKSUM = "sha256"  # metadata key of the `content_hash` of tensors and other metadata
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFile:
    """An open safetensors file. Opening it reads only the header."""

    def __init__(self, path: Path, file: Any, mapped: bool = True) -> None:
        self.path, self._file, self._mapped = path, file, mapped
        self.metadata: dict[str, str] = dict(file.metadata() or {})
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.layout: Layout = {
            name: (_TYPES.get(x.get_dtype(), x.get_dtype()), tuple(x.get_shape())) for name, x in slices.items()
        }

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU; a mapped file's tensor is a view of the map."""
        return self._file.get_tensor(name) if self._mapped else self._read(name)

    def _read(self, name: str) -> Tensor:
        dtype, shape = self.layout[name]
        assert isinstance(dtype, torch.dtype)
        x = torch.empty(shape, dtype=dtype)
        with self.path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start + json.loads(file.read(start - 8))[name]["data_offsets"][0])
            file.readinto(x.view(-1).view(torch.uint8).numpy().data)
        return x

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, on the CPU.

        Raises:
            UserError: the content does not match the file's checksum, if it has one.
        """
        tensors = {name: self.tensor(name) for name in self.layout}
        metadata = dict(self.metadata)
        written = metadata.pop(CHECKSUM, None)
        if written is not None and written != content_hash(tensors, _canonical(metadata)):
            raise UserError(f"{self.path}: is damaged: its content does not match its checksum")
        return tensors


@contextmanager
def open_tensors(path: Path, damage: str, *, mapped: bool = True) -> Iterator[TensorFile]:
    """Open a safetensors file. Files without a checksum, from other programs or earlier versions, are accepted.

    Args:
        path: the file.
        damage: the error message for a damaged header.
        mapped: whether tensors are views of the mapped file; if not, each is read into its own, aligned memory.

    Raises:
        UserError: the file is absent or not a regular file, or its header is damaged.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt" if mapped else "np") as file:
            yield TensorFile(path, file, mapped)
    except (
        SafetensorError,
        UnicodeDecodeError,
        MemoryError,
    ) as error:  # Memory: a file beyond the address space
        raise UserError(f"{path}: {damage}: {error!s:.300}") from None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; with `metadata`, include a checksum of the content.

    Raises:
        UserError: the disk is full or the file is not writable.
    """
    if metadata is not None:
        metadata = {**metadata, CHECKSUM: content_hash(tensors, _canonical(metadata))}
    try:
        with atomic_file(path) as temporary:
            save_file(dict(tensors), temporary, dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def content_hash(tensors: Mapping[str, Tensor], prefix: bytes = b"") -> str:
    """Return the SHA-256, in hexadecimal, of `prefix` and all tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(prefix)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Return the type and shape of each tensor."""
    return {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}


def difference(found: Layout, expected: Layout) -> str | None:
    """Describe the first difference from the expected tensors and count them; return None if there is none."""
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if not wrong:
        return None
    name = wrong[0]
    more = f" ({len(wrong)} such tensors)" if len(wrong) > 1 else ""
    return f"'{name}' is {_describe(found.get(name))}, should be {_describe(expected.get(name))}{more}"


def _describe(entry: tuple[torch.dtype | str, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{str(entry[0]).removeprefix('torch.')} {entry[1]}"


def _canonical(metadata: Mapping[str, str]) -> bytes:
    return json.dumps(metadata, sort_keys=True).encode()
