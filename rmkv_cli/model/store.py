"""The associative store: bindings of keys to values, one matrix a head, written by the delta rule."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig

TAPS = 4  # tokens that the short convolution sees


class AssociativeStore(nn.Module):
    """A matrix W (d, d) a head that holds values under keys: k W ≈ v for the keys and values of earlier segments.

    A token's value is written under the key of the token before it: a token finds what came after its like. Values,
    queries and keys are the attention's own, without positions, the last two through a short convolution, so that a key
    can tell what stood before it. Of its own the store has that, two gates a head, a norm, and the learned W that a
    document starts with, which holds what mostly follows. It computes in the weights' precision even under autocast:
    what is written is a difference.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H = config.num_attention_heads
        self.gates = nn.Linear(config.hidden_size, 2 * H)
        self.norm = nn.RMSNorm(config.head_size, eps=1e-6)
        nn.init.zeros_(self.gates.bias)
        self.taps = nn.Parameter(torch.zeros(TAPS, 2 * H, 1, config.head_size))
        nn.init.ones_(self.taps[0])
        self.start = nn.Parameter(0.02 * torch.randn(H, config.head_size, config.head_size))

    def strengths(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return how strongly tokens hidden (B, T, D) write and read, each (B, H, T) from 0 to 1."""
        write, read = torch.sigmoid(self.gates(hidden)).transpose(1, 2).chunk(2, dim=1)
        return write, read

    def convolve(self, q: Tensor, k: Tensor, recent: Tensor, follows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, each channel a learned sum over a token and the three before it in its document.

        Args:
            q, k: (B, H, T, d).
            recent: (B, 2H, 3, d), the last token's queries and keys, and those one and two before it.
            follows: (B, T, 1), True: the token before is of the same document.

        Returns:
            Queries and keys (B, H, T, d), and what `recent` is after these tokens.
        """
        terms = [torch.cat([q, k], dim=1)]
        for i in range(TAPS - 1):
            terms.append(torch.cat([recent[:, :, i : i + 1], terms[i][:, :, :-1]], dim=2) * follows[:, None])
        sums = sum(tap * term for tap, term in zip(self.taps, terms, strict=True)).to(q.dtype)
        return *sums.chunk(2, dim=1), torch.stack([term[:, :, -1] for term in terms[:-1]], dim=2)

    def read(self, store: Tensor, q: Tensor, strength: Tensor, own: Tensor) -> Tensor:
        """Return RMSNorm(q W) times the strength (B, H, T), as (B, H, T, d), for store (B, H, d, d), q (B, H, T, d).

        Tokens whose document did not write the store, False in `own` (B, T), read the learned start in its place.
        """
        with torch.autocast(q.device.type, enabled=False):
            q = F.normalize(q.to(store.dtype), dim=-1)
            found = self.norm(torch.where(own[:, None, :, None], q @ store, q @ self.start))
        return (found * strength[..., None]).to(q.dtype)

    def write(self, store: Tensor, k: Tensor, v: Tensor, strength: Tensor) -> Tensor:
        """Return W' after one segment's keys and values (B, H, S, d), written with strengths b (B, H, S).

        For each token in turn W <- W + b k^T (v - k W): the delta rule, for the whole segment at once by one triangular
        system (Yang et al., 2024, "Parallelizing linear transformers with the delta rule"). Nothing fades by itself:
        only what is written under a like key takes something away.
        """
        with torch.autocast(k.device.type, enabled=False):
            k, v, b = F.normalize(k.to(store.dtype), dim=-1), v.to(store.dtype), strength.to(store.dtype)[..., None]
            earlier = (b * (k @ k.mT)).tril(-1)
            error = torch.linalg.solve_triangular(earlier, b * (v - k @ store), upper=False, unitriangular=True)
            return store + k.mT @ error
