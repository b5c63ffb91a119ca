"""Norm of the residual stream, used before attention, feed-forward and head."""

from torch import nn

from rmkv_cli.config import ModelConfig


def make_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """Return a new norm of the configured kind for the residual stream."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)
