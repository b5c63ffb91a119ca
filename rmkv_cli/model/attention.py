"""Multi-head attention, and the pooling that summarises a segment for the memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.precision import widened


class QKVBlock(nn.Module):
    """Multi-head attention with one matrix for queries, keys and values, an explicit scale and a mask."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        with torch.no_grad():  # keys start as queries: like finds like from the first step, in the store above all
            query, key, _ = self.qkv.weight.chunk(3)
            key.copy_(query)

    def project(self, hidden: Tensor) -> Tensor:
        """Return Q, K and V side by side, (B, T, 3, H, d), for hidden (B, T, D)."""
        return self.qkv(hidden).unflatten(2, (3, self.heads, self.head_size))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Return the heads' results side by side, (B, T, D), before the output projection `out`.

        Args:
            q: (B, H, T, d).
            k, v: (B, H, K, d).
            mask: (B, 1, T, K), added to the scores: 0 where a key is seen, -inf where it is not.
        """
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.head_size**-0.5)
        return y.transpose(1, 2).flatten(2)


class AttentionPooling(nn.Module):
    """P_j = sum over tokens i of softmax_i(q_j · x_i / sqrt(D)) x_i, with one learned query q_j a slot."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.memory.slots, config.hidden_size))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return P (B, m, D) for tokens x (B, S, D) and a mask (B, 1, S) that is added to the scores."""
        # Plain products, because no fused attention kernel takes a head as wide as the model.
        scores = torch.baddbmm(mask, self.queries.expand(len(x), -1, -1), x.mT, alpha=x.shape[-1] ** -0.5)
        # The softmax needs unrounded weights for its gradient, a difference of nearly equal numbers.
        return scores.softmax(-1, dtype=widened(x.dtype)).to(x.dtype) @ x
