"""Multi-head attention, and the pooling that summarises a segment for the memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig

QUERY, KEY_VALUE, ALL = slice(0, 1), slice(1, 3), slice(0, 3)


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

    def project(self, hidden: Tensor, parts: slice = ALL) -> tuple[Tensor, ...]:
        """Return those of Q, K and V that `parts` names, each (B, H, T, d), for hidden (B, T, D)."""
        B, T, D = hidden.shape
        projected = F.linear(hidden, self.qkv.weight.view(3, D, D)[parts].flatten(0, 1))
        return (
            projected.view(B, T, parts.stop - parts.start, self.heads, self.head_size).permute(2, 0, 3, 1, 4).unbind()
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Return the heads' results side by side, (B, T, D), before the output projection `out`.

        Args:
            q: (B, H, T, d).
            k, v: (B, H, K, d).
            mask: (B, 1, T, K), True: seen.
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
        """Return P (B, m, D) for tokens x (B, S, D) and mask (B, 1, S), True: counted."""
        q = self.queries.expand(len(x), 1, -1, -1)
        x = x[:, None]
        return F.scaled_dot_product_attention(q.to(x.dtype), x, x, mask[:, None], scale=x.shape[-1] ** -0.5)[:, 0]
