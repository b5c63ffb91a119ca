"""Positions: sinusoids added to the embeddings, and rotations of queries and keys. Computed, never stored."""

import math

import torch
from torch import Tensor

from rmkv_cli.config import ModelConfig

BASE = 10_000.0

Rotation = tuple[Tensor, Tensor]
"""Cosines, and sines with the sign that `rotate` gives them, (B, T, d)."""


def _frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """Return `width` frequencies base^(-i / width) in radians per position, as float64.

    float32 would be off by 0.01 radians at position 131,072.
    """
    return base ** -(torch.arange(width, dtype=torch.float64, device=device) / width)


def sinusoids(positions: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Return the sinusoidal encoding (Vaswani et al., 2017) of positions (B, T) as (B, T, D)."""
    angles = positions[..., None] * _frequencies(hidden_size // 2, BASE, positions.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Return the rotations (RoPE: Su et al., 2021) of positions (B, T)."""
    frequencies = _frequencies(config.head_width // 2, config.rope.theta, positions.device)
    rope = config.rope
    if rope.factor != 1:  # Llama 3.1: 0 where a frequency is divided, 1 where it is kept
        turns = frequencies * (rope.original_max_position_embeddings / (2 * math.pi))
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        frequencies = torch.lerp(frequencies / rope.factor, frequencies, kept)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Return x (..., d) with each pair of channels (i, i + d / 2) turned by its angle; `by` is broadcast to x."""
    cos, sin = by
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
