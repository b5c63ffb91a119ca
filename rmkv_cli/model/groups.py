"""Assign each parameter to a part of the model, and select those that `train.trainable` names."""

from collections.abc import Sequence

from torch import nn

from rmkv_cli.model.adapters import ADAPTER_MARK

PARTS = {  # prefixes of parameters' names, or, with a dot, substrings
    "embeddings": ("embedding", "unembedding", "position"),
    "attention": (".attention.",),
    "pooling": (".pooling.",),
    "cells": (".cell.",),
    "store": (".store.",),
    "feed_forward": (".feed_forward.",),
    "experts": (".experts.",),
    "initial_memory": ("memory",),
    "norms": ("norm.", ".norm.", "_norm."),
}
_GROUPS = {"memory": ("pooling", "cells", "initial_memory"), "feed_forward": ("feed_forward", "experts")}
"""Groups of several parts; every other part is a group."""


def part_of(name: str) -> str:
    """Return the part that the parameter of this name belongs to."""
    return next(part for part, marks in PARTS.items() if any(_matches(name, mark) for mark in marks))


def group_of(name: str) -> str:
    """Return the group of `train.trainable` that the parameter of this name belongs to."""
    if ADAPTER_MARK in name:
        return "adapters"
    part = part_of(name)
    return next((group for group, parts in _GROUPS.items() if part in parts), part)


def is_memory_start(name: str) -> bool:
    """Return whether the parameter of this name is an initial memory: the slots' or a store's."""
    return name == "memory" or name.endswith(".store.start")


def is_trained(name: str, trainable: str | Sequence[str]) -> bool:
    """Return whether `train.trainable` selects the parameter of this name."""
    if trainable == "all":
        return True
    chosen = [trainable] if isinstance(trainable, str) else trainable
    return group_of(name) in chosen or ("memory start" in chosen and is_memory_start(name))


def freeze(model: nn.Module, trainable: str | Sequence[str]) -> None:
    """Require gradients of the parameters that `train.trainable` selects, and of no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, trainable))


def _matches(name: str, mark: str) -> bool:
    return mark in name if "." in mark else name.split(".")[0] == mark
