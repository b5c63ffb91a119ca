"""Compress the tensors of notes to bfloat16, or to int8 with a scale for each row."""

from collections.abc import Mapping
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor

from rmkv_cli.model.tensors import Layout

Compression = Literal["bf16", "int8"]
SCALE = ".scale"
"""Suffix of the name of a tensor's scales."""


def is_compression(name: str) -> TypeGuard[Compression]:
    """Return whether this is the name of a compression."""
    return name in get_args(Compression)


def compress(tensors: Mapping[str, Tensor], how: Compression) -> dict[str, Tensor]:
    """Return the tensors with their floating-point numbers compressed.

    With int8, a tensor (..., d) becomes round(x / scale), and `<name>.scale`, float32 (..., 1), is the largest
    magnitude of each row divided by 127.
    """
    found = {}
    for name, x in tensors.items():
        if not x.is_floating_point():
            found[name] = x
        elif how == "bf16":
            found[name] = x.bfloat16()
        else:
            scale = x.float().abs().amax(-1, keepdim=True) / 127
            found[name] = (x.float() / scale.clamp(min=1e-30)).round().to(torch.int8)
            found[f"{name}{SCALE}"] = scale
    return found


def expand(tensors: Mapping[str, Tensor], types: Layout) -> dict[str, Tensor]:
    """Return compressed tensors, decompressed to the types of a layout."""
    found = {}
    for name, (dtype, _) in types.items():
        x = tensors[name]
        if f"{name}{SCALE}" in tensors:
            x = x.float() * tensors[f"{name}{SCALE}"]
        assert isinstance(dtype, torch.dtype)
        found[name] = x.to(dtype)
    return found


def compressed_layout(types: Layout, how: Compression) -> Layout:
    """Return the layout of the tensors that `compress` returns for tensors of this layout."""
    found: Layout = {}
    for name, (dtype, shape) in types.items():
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            found[name] = dtype, shape
        elif how == "bf16":
            found[name] = torch.bfloat16, shape
        else:
            found[name] = torch.int8, shape
            found[f"{name}{SCALE}"] = torch.float32, (*shape[:-1], 1)
    return found
