"""How much of the memory's bandwidth writing takes: reading all weights once a token is what bounds it."""

import time

import torch

from rmkv_cli.model import RMKV
from rmkv_cli.model.cost import state_bytes, touched_per_token

BUFFER = 1 << 28  # bytes, more than caches hold
ROUNDS = 5


def memory_bandwidth(device: str) -> float:
    """Return the bytes a second that the device reads at best, from a buffer of 256 MiB."""
    buffer = torch.ones(BUFFER // 4, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - start)
    return BUFFER / best


def bandwidth_share(model: RMKV, tokens_per_second: float) -> float:
    """Return the share of its device's memory bandwidth that writing one text at this rate takes."""
    return tokens_per_second * bytes_per_token(model) / memory_bandwidth(str(model.memory.device))


def bytes_per_token(model: RMKV) -> int:
    """Return the bytes that writing one token of one text reads: the weights that it touches, and its state."""
    element = model.embedding.weight.element_size()
    wide = max(4, element)
    return touched_per_token(model.config) * element + state_bytes(model.config, wide, element)[1]
