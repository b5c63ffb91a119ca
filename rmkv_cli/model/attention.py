"""Multi-head attention, and the pooling that summarizes a segment for the memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.precision import wide_dtype, widen


class QKVBlock(nn.Module):
    """Multi-head attention with a joint projection of queries, keys and values, an explicit scale and a mask.

    Each of the G key-value heads serves H / G query heads (grouped-query attention: Ainslie et al., 2023).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, G, d, D = config.num_attention_heads, config.key_value_heads, config.head_width, config.hidden_size
        self.heads, self.head_width = (H, G, G), d
        self.dropout = config.dropout
        self.qkv = nn.Linear(D, (H + 2 * G) * d, bias=config.qkv_bias)
        self.out = nn.Linear(H * d, D, bias=False)
        self.query_norm = nn.RMSNorm(d, config.norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(d, config.norm_eps) if config.qk_norm else None
        with torch.no_grad():  # keys start equal to queries: the store then matches similar tokens from the first step
            query, key, _ = self.qkv.weight.split([heads * d for heads in self.heads])
            key.copy_(query[: len(key)])

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and K concatenated, (B, T, H + G, d), and V, (B, T, G, d), for hidden (B, T, D)."""
        H, G, _ = self.heads
        qkv = self.qkv(hidden).unflatten(2, (-1, self.head_width))
        qk, v = qkv.split_with_sizes([H + G, G], dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = qk.split_with_sizes([H, G], dim=2)
            qk = torch.cat([self.query_norm(q), self.key_norm(k)], dim=2)
        return qk, v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Return the heads' outputs concatenated, (B, T, H * d), before the output projection `out`.

        Args:
            q: queries, (B, H, T, d).
            k: keys, (B, G, K, d).
            v: values, (B, G, K, d).
            mask: additive mask, (B, 1, T, K): 0 where a query sees a key, else -inf.
        """
        dropout = self.dropout if self.training else 0.0
        if q.shape[2] == 1 and q.device.type == "cpu":
            return self._one_token(q, k, v, mask, dropout)
        shared = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.head_width**-0.5, enable_gqa=shared)
        return y.transpose(1, 2).flatten(2)

    def _one_token(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
        """Return the same as `forward` for one token per text, faster on a CPU.

        Query heads that share keys become rows of one product, which avoids a copy of the keys per head. A single row
        per head is computed in float32, because PyTorch multiplies it by bfloat16 keys more slowly than it converts
        them.
        """
        rows = q.view(len(q), k.shape[1], -1, self.head_width)
        if rows.shape[2] == 1:
            rows, k, v, mask = (widen(x) for x in (rows, k, v, mask))
        y = F.scaled_dot_product_attention(rows, k, v, mask, dropout, scale=self.head_width**-0.5)
        return y.reshape(len(q), 1, -1).to(q.dtype)


class AttentionPooling(nn.Module):
    """P_j = sum over tokens i of softmax_i(q_j · x_i / sqrt(D)) x_i, with one learned query q_j per slot."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.memory.slots, config.hidden_size))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return P, (B, m, D), for tokens x, (B, S, D), and an additive mask, (B, 1, S)."""
        # Plain matrix products, because no fused attention kernel supports a head as wide as the model.
        scores = torch.baddbmm(mask, self.queries.expand(len(x), -1, -1), x.mT, alpha=x.shape[-1] ** -0.5)
        # The softmax's gradient is a difference of nearly equal numbers, so its weights must not be rounded.
        return scores.softmax(-1, dtype=wide_dtype(x.dtype)).to(x.dtype) @ x
