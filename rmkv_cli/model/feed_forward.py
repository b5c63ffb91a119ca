"""Gated feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig


class FeedForward(nn.Module):
    """W_d(SigLU(W_g n) * W_u n), where SigLU(x) = x sigmoid(x) (SwiGLU: Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, n: Tensor) -> Tensor:
        """Return the layer's output, (B, T, D), for normalized tokens n, (B, T, D)."""
        return self.dropout(self.down(F.silu(self.gate(n)) * self.up(n)))
