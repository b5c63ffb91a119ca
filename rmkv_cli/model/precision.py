"""Precision policy: which parameters take the model's `dtype`, float32 or bfloat16, and which stay in float32."""

import torch
from torch import Tensor, nn


def is_narrow(name: str) -> bool:
    """Return whether the parameter of this name takes the model's `dtype`.

    Everything that the token stream passes through does: embeddings, norms, pooling, attention, feed-forward and
    experts. Slots, cells, stores and an expert's balance stay in float32, because bfloat16 cannot resolve their small
    updates, and so does the router, whose small differences choose the experts.
    """
    return name != "memory" and not any(part in name for part in (".cell.", ".store.", ".router.", ".balance"))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of slots, cells and stores in a model that computes in `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the parameter of this name in a model that computes in `dtype`."""
    return dtype if is_narrow(name) else wide_dtype(dtype)


def widen(x: Tensor) -> Tensor:
    """Return a tensor in the type that slots, cells and stores compute in."""
    return x.to(wide_dtype(x.dtype))


def to_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model in place to compute in `dtype`."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, dtype))
