"""The associative store: bindings of keys to values, one matrix a head, written by the delta rule."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmkv_cli.config import ModelConfig

TAPS = 4  # tokens that the short convolution sees


class AssociativeStore(nn.Module):
    """A matrix W (d, d) a head that holds values under keys: k W ≈ v for the keys and values of earlier tokens.

    A token's value is written under the key of the token before it: a token finds what came after its like. Values,
    queries and keys are the attention's own, without positions, the last two through a short convolution, so that a key
    can tell what stood before it. Of its own the store has that, two gates a head, a norm, and the learned W that a
    document starts with, which holds what mostly follows. The gates see a token and what attention found for it: a
    digit is worth writing or not by what it is part of. The store computes in its own precision, float32 even under
    autocast or with half-precision weights, because it writes differences.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H = config.num_attention_heads
        self.gates = nn.Linear(2 * config.hidden_size, 2 * H)
        self.norm = nn.RMSNorm(config.head_size, eps=1e-6)
        nn.init.zeros_(self.gates.bias)
        self.taps = nn.Parameter(torch.zeros(TAPS, 2 * H, 1, config.head_size))
        nn.init.ones_(self.taps[0])
        self.start = nn.Parameter(0.02 * torch.randn(H, config.head_size, config.head_size))

    def convolve(self, q: Tensor, k: Tensor, recent: Tensor, follows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, and keys of the tokens before: each channel a learned sum over a token and three before it.

        Tokens of other documents count as zeros, so a document's first token gets no key to write under.

        Args:
            q, k: (B, H, T, d).
            recent: (B, 2H, 4, d), queries and keys of the last token and of those one to three before it.
            follows: (B, T, 1), True: the token before is of the same document.

        Returns:
            Queries and keys (B, H, T, d), and what `recent` is after these tokens.
        """
        H = q.shape[1]
        terms = [torch.cat([q, k], dim=1)]  # of each token, of the one before it, and so on
        for i in range(TAPS):
            terms.append(torch.cat([recent[:, :, i : i + 1], terms[i][:, :, :-1]], dim=2) * follows[:, None])
        q = sum((tap[:H] * term[:, :H] for tap, term in zip(self.taps, terms, strict=False)), q.new_zeros(()))
        k = sum((tap[H:] * term[:, H:] for tap, term in zip(self.taps, terms[1:], strict=True)), k.new_zeros(()))
        return q, k, torch.stack([term[:, :, -1] for term in terms[:-1]], dim=2)

    def forward(
        self, store: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, own: Tensor, same: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Read and write T tokens; return what each finds, heads side by side (B, T, D), and W' of the last's document.

        For each token in turn W <- W + b k^T (v - k W), the delta rule, and then it finds RMSNorm(q W) times its read
        strength; all at once by one triangular system (Yang et al., 2024, "Parallelizing linear transformers with the
        delta rule"). Nothing fades by itself: only what is written under a like key takes something away.

        Args:
            store: W (B, H, d, d).
            q, k, v: (B, H, T, d); of q and k only the direction counts.
            gates: (B, T, 2H), before their sigmoid: how strongly each token writes, b, and reads.
            own: (B, T), True: W is of the token's document; others begin with the learned start.
            same: (B, T, T), True: two tokens are of the same document.
        """
        with torch.autocast(q.device.type, enabled=False):
            write, read = torch.sigmoid(gates.to(store.dtype)).transpose(1, 2)[..., None].chunk(2, dim=1)
            q, k = (F.normalize(x.to(store.dtype), dim=-1, eps=1e-6) for x in (q, k))
            own, same, start = own[:, None, :, None], same[:, None], self.start.to(store.dtype)
            retrieved, predicted = (torch.where(own, x @ store, x @ start) for x in (q, k))
            earlier = (write * (k @ k.mT) * same).tril(-1)
            error = write * (v.to(store.dtype) - predicted)
            error = torch.linalg.solve_triangular(earlier, error, upper=False, unitriangular=True)
            found = retrieved + ((q @ k.mT) * same).tril() @ error
            found = F.rms_norm(found, found.shape[-1:], self.norm.weight.to(store.dtype), self.norm.eps) * read
            before = torch.where(own[:, :, -1:], store, start)
            after = before + (k * same[:, :, -1, :, None]).mT @ error
        return found.transpose(1, 2).flatten(2).to(v.dtype), after

    def step(
        self, store: Tensor, recent: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, follows: Tensor
    ) -> Tensor:
        """Convolve, write and read one token, in place; return what it finds, (B, 1, D).

        Args:
            store: W (B, H, d, d), of the token's document.
            recent: (B, 2H, 4, d), as `convolve` takes it.
            q, k, v: (B, H, 1, d), before the convolution.
            gates: (B, 1, 2H), before their sigmoid.
            follows: (B, 1), True: the token before is of the same document.
        """
        H = q.shape[1]
        terms = torch.cat([torch.cat([q, k], dim=1), recent * follows[:, :, None, None]], dim=2)  # (B, 2H, 5, d)
        taps = self.taps[:, :, 0].transpose(0, 1)  # (2H, 4, d)
        recent.copy_(terms[:, :, :TAPS])
        q, k = (terms[:, :H, :TAPS] * taps[:H]).sum(2, keepdim=True), (terms[:, H:, 1:] * taps[H:]).sum(2, keepdim=True)
        with torch.autocast(q.device.type, enabled=False):
            write, read = torch.sigmoid(gates.to(store.dtype)).transpose(1, 2)[..., None].chunk(2, dim=1)
            q, k = (F.normalize(x.to(store.dtype), dim=-1, eps=1e-6) for x in (q, k))
            store += k.mT * (write * (v.to(store.dtype) - k @ store))
            found = self.norm(q @ store) * read
        return found.transpose(1, 2).flatten(2).to(v.dtype)
