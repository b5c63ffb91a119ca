"""Measure the share of the memory bandwidth that decoding uses; reading all weights once per token limits its speed."""

import time

import torch

from rmkv_cli.model import RMKV
from rmkv_cli.model.cost import TOKEN_PARTS, unused_by_a_token
from rmkv_cli.model.groups import part_of
from rmkv_cli.model.size import state_bytes

BUFFER = 1 << 28  # bytes; larger than caches
ROUNDS = 5


def memory_bandwidth(device: str) -> float:
    """Return the highest rate, in bytes per second, at which the device reads a buffer of 256 MiB."""
    buffer = torch.ones(BUFFER // 4, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - start)
    return BUFFER / best


def bandwidth_share(model: RMKV, tokens_per_second: float) -> float:
    """Return the share of the device's memory bandwidth that generating one text at this rate uses."""
    return tokens_per_second * bytes_per_token(model) / memory_bandwidth(str(model.memory.device))


def bytes_per_token(model: RMKV) -> int:
    """Return the bytes read to generate one token of one text: the weights used, and the state."""
    element = model.dtype.itemsize
    weights = sum(x.nbytes for name, x in model.state_dict().items() if part_of(name) in TOKEN_PARTS)
    weights -= unused_by_a_token(model.config) * element
    head = (model.unembedding or model.embedding).state_dict()
    return weights + sum(x.nbytes for x in head.values()) + state_bytes(model.config, max(4, element), element)[1]
