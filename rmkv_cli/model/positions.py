"""Positions: sinusoids added to the embeddings, and rotations of queries and keys. Computed, never stored."""

import torch
from torch import Tensor

BASE = 10_000.0

Rotation = tuple[Tensor, Tensor]
"""Cosines, and sines with the sign that `rotate` gives them, (B, T, d)."""


def _angles(positions: Tensor, width: int) -> Tensor:
    """Return positions (B, T) times `width` frequencies BASE^(-i / width), as float64 (B, T, width): float32 would be
    off by 0.01 radians at position 131,072."""
    exponents = torch.arange(width, dtype=torch.float64, device=positions.device) / width
    return positions.double()[..., None] * BASE**-exponents


def sinusoids(positions: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Return the sinusoidal encoding (Vaswani et al., 2017) of positions (B, T) as (B, T, D)."""
    angles = _angles(positions, hidden_size // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def rotation(positions: Tensor, head_size: int, dtype: torch.dtype) -> Rotation:
    """Return the rotations (RoPE: Su et al., 2021) that belong to positions (B, T)."""
    angles = _angles(positions, head_size // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Return x (..., d) with each pair of channels (i, i + d / 2) turned by its angle; `by` is broadcast to x."""
    cos, sin = by
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
