"""The published formulation of RMKV, written down from its formulas and not from rmkv: slow in the ways that it is.

Scores are materialised and masked explicitly, the mask is made anew for every layer and segment, the cell updates one
slot after the other, and nothing is replayed. Its memory goes to the same layer of the next segment, which costs as
much as the next layer and is causal.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Attention over [memory; tokens], pooling, a GRU cell a slot, and a gated feed-forward."""

    def __init__(self, size: int, heads: int, inner: int, slots: int) -> None:
        super().__init__()
        self.heads, self.slots = heads, slots
        self.norm, self.inner_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.key, self.value, self.out = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.pools = nn.Parameter(torch.randn(slots, size))
        self.cell = nn.GRUCell(size, size)
        self.gate, self.up, self.down = (
            nn.Linear(*shape, bias=False) for shape in ((size, inner), (size, inner), (inner, size))
        )

    def forward(self, memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next memory (B, m, D) and the tokens (B, S, D)."""
        B, S, D = x.shape
        m = self.slots
        z = self.norm(torch.cat([memory, x], dim=1))
        q, k, v = (f(z).view(B, m + S, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        seen = torch.ones(m + S, m + S, dtype=torch.bool, device=x.device)
        for token in range(S):
            seen[m + token, m + token + 1 :] = False
        scores = (q @ k.mT) / math.sqrt(D // self.heads)
        scores = scores.masked_fill(~seen, float("-inf"))
        y = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, m + S, D))
        y_m, y_x = y[:, :m], y[:, m:]
        pooled = (self.pools @ y_x.mT / math.sqrt(D)).softmax(-1) @ y_x
        memory = torch.stack([self.cell(pooled[:, slot], y_m[:, slot]) for slot in range(m)], dim=1)
        x = x + y_x
        n = self.inner_norm(x)
        return memory, x + self.down(F.silu(self.gate(n)) * self.up(n))


class Published(nn.Module):
    """Reads rows segment by segment and returns their mean loss."""

    def __init__(self, vocab: int, size: int, layers: int, heads: int, inner: int, slots: int, segment: int) -> None:
        super().__init__()
        self.segment = segment
        self.embedding = nn.Embedding(vocab, size)
        self.memory = nn.Parameter(0.02 * torch.randn(layers, slots, size))
        self.layers = nn.ModuleList(Layer(size, heads, inner, slots) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of rows (B, T)."""
        memories = [memory.expand(len(input_ids), -1, -1) for memory in self.memory]
        outputs = []
        for start in range(0, input_ids.shape[1], self.segment):
            x = self.embedding(input_ids[:, start : start + self.segment]) + self._positions(start)
            for i, layer in enumerate(self.layers):
                memories[i], x = layer(memories[i], x)
            outputs.append(self.norm(x))
        logits = torch.cat(outputs, dim=1) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _positions(self, start: int) -> Tensor:
        """Return sinusoids (S, D) (Vaswani et al., 2017)."""
        half, device = self.embedding.embedding_dim // 2, self.embedding.weight.device
        at = torch.arange(start, start + self.segment, device=device)[:, None]
        at = at / 10000 ** (torch.arange(half, device=device) / half)
        return torch.cat([at.sin(), at.cos()], dim=-1)
