"""How much of the memory's bandwidth writing takes: reading all weights once a token is what bounds it."""

import time

import torch

from rmkv_cli.model import RMKV
from rmkv_cli.model.groups import part_of
from rmkv_cli.model.size import state_bytes

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
    element = model.dtype.itemsize
    parts = ("attention", "store", "feed_forward", "norms")
    weights = sum(x.nbytes for name, x in model.state_dict().items() if part_of(name) in parts)
    head = (model.unembedding or model.embedding).state_dict()
    return weights + sum(x.nbytes for x in head.values()) + state_bytes(model.config, max(4, element), element)[1]
