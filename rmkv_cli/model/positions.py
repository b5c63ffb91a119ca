"""Positions: sinusoids added to the embeddings, and rotations of queries and keys. Computed, never stored."""

import torch
from torch import Tensor

BASE = 10_000.0

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, (B, 1, T, d / 2)."""


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
    angles = _angles(positions, head_size // 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Return x (B, H, T, d) with each pair of channels (i, i + d / 2) turned by its angle."""
    cos, sin = by
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
