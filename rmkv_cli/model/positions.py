"""Positions: sinusoids added to embeddings, and rotations of queries and keys. Both are computed, never stored."""

import math

import torch
from torch import Tensor

from rmkv_cli.config import ModelConfig

BASE = 10_000.0

Rotation = tuple[Tensor, Tensor]
"""Cosines, and sines with the signs that `rotate` needs, both (B, T, d)."""


def _frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """Return the frequencies base^(-i / width) for i < width, in radians per position, as float64.

    In float32, angles would be wrong by 0.01 radians at position 131,072.
    """
    return base ** -(torch.arange(width, dtype=torch.float64, device=device) / width)


def sinusoids(positions: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Return the sinusoidal encoding (Vaswani et al., 2017), (B, T, D), of positions (B, T)."""
    angles = positions[..., None] * _frequencies(hidden_size // 2, BASE, positions.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Return the rotations (RoPE: Su et al., 2021), each (B, T, d), of positions (B, T)."""
    frequencies = _frequencies(config.head_width // 2, config.rope.theta, positions.device)
    rope = config.rope
    if rope.factor != 1:  # Llama 3.1 divides low frequencies (kept = 0) and keeps high ones (kept = 1)
        turns = frequencies * (rope.original_max_position_embeddings / (2 * math.pi))
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        frequencies = torch.lerp(frequencies / rope.factor, frequencies, kept)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos_sin: Rotation) -> Tensor:
    """Return x, (..., d), with each pair of channels (i, i + d / 2) rotated; the rotation is broadcast to x."""
    cos, sin = cos_sin
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
