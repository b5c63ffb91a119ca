"""Which part of a model each parameter belongs to, and which parameters `train.trainable` selects."""

from collections.abc import Sequence

from torch import nn

from rmkv_cli.model.adapters import MARK

PARTS = {  # by where a parameter's name begins, or what it contains
    "embeddings": ("embedding", "unembedding", "position"),
    "attention": (".attention.",),
    "pooling": (".pooling.",),
    "cells": (".cell.",),
    "store": (".store.",),
    "feed_forward": (".feed_forward.",),
    "initial_memory": ("memory",),
    "norms": ("norm.", ".norm.", "_norm."),
}
_MEMORY = ("pooling", "cells", "initial_memory")  # the parts of the group "memory"; other groups are parts


def part_of(name: str) -> str:
    """Return the part that the parameter of this name belongs to."""
    return next(part for part, marks in PARTS.items() if any(_matches(name, mark) for mark in marks))


def group_of(name: str) -> str:
    """Return the group of `train.trainable` that the parameter of this name belongs to."""
    if MARK in name:
        return "adapters"
    part = part_of(name)
    return "memory" if part in _MEMORY else part


def is_memory_start(name: str) -> bool:
    """Return whether a document's memory starts with the parameter of this name: slots, or a layer's store."""
    return name == "memory" or name.endswith(".store.start")


def is_trained(name: str, trainable: str | Sequence[str]) -> bool:
    """Return whether `train.trainable` selects the parameter of this name."""
    if trainable == "all":
        return True
    chosen = [trainable] if isinstance(trainable, str) else trainable
    return group_of(name) in chosen or ("memory start" in chosen and is_memory_start(name))


def freeze(model: nn.Module, trainable: str | Sequence[str]) -> None:
    """Let the parameters that `train.trainable` selects take gradients, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, trainable))


def _matches(name: str, mark: str) -> bool:
    return mark in name if "." in mark else name.split(".")[0] == mark
