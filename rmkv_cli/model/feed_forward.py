"""Gated feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """W_d(SigLU(W_g n) * W_u n), where SigLU(x) = x sigmoid(x) (SwiGLU: Shazeer, 2020)."""

    PARTS = "gate", "up", "down"

    def __init__(self, width: int, inner_width: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner_width, bias=False)
        self.up = nn.Linear(width, inner_width, bias=False)
        self.down = nn.Linear(inner_width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, n: Tensor) -> Tensor:
        """Return the layer's output, (B, T, D), for normalized tokens n, (B, T, D)."""
        return self.dropout(self.down(F.silu(self.gate(n)) * self.up(n)))
