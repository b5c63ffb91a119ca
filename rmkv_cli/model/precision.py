"""The precision policy: what a model computes in its `dtype`, bfloat16 or float32, and what stays in float32."""

import torch
from torch import nn

NARROW = (".attention.", ".feed_forward.", ".gates.")


def is_narrow(name: str) -> bool:
    """Return whether the parameter of this name takes the model's `dtype`: embeddings and the layers' large matrices.

    Norms, pooling queries, cells, slots and stores stay in float32: their updates are smaller than bfloat16 resolves.
    """
    return name.split(".")[0] in ("embedding", "unembedding", "position") or any(part in name for part in NARROW)


def to_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model in place to compute in `dtype`; parameters that the policy keeps wide become float32, or float64
    if `dtype` is."""
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype if is_narrow(name) else wide)
