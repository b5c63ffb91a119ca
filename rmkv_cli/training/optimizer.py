"""The optimizer's parameter groups, the learning rate's schedule, and how many segments a row has."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rmkv_cli.config import Phase, TrainConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to the matrices of attention and feed-forward, and to nothing else.

    Gates, norms, embeddings, biases, pooling queries and slots are left alone.
    """
    return parameter.ndim == 2 and (".attention." in name or ".feed_forward." in name)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter, 2019): matrices with decay, all else without."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Return the learning rate when a share `progress` (0 to 1) of the tokens has been seen.

    A linear warm-up, then a half cosine (Loshchilov & Hutter, 2017) or warm-up-stable-decay (Hu et al., 2024).
    """
    high, low = config.learning_rate, config.final_learning_rate
    if progress < config.warmup:
        return high * progress / config.warmup
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))
    else:
        left = min(1.0, (1 - progress) / config.decay) if config.decay else 1.0
    return low + (high - low) * left


def row_segments(config: TrainConfig, phases: Sequence[Phase], step: int, progress: float) -> int:
    """Return how many segments the rows of a step have: uniform from the least to the most of its phase.

    Where the phase names no most, or there is none, it is one that grows from segments_min to segments_max over the
    first half of the training.
    """
    least, most = config.segments_min, config.segments_max
    grown = round(least + (most - least) * min(1.0, 2 * progress))
    phase = phase_at(phases, progress)
    if phase is not None:
        least = phase.segments_min or least
        grown = phase.segments_max or max(least, grown)
    return int(np.random.default_rng([config.seed, step]).integers(min(least, grown), grown + 1))


def phase_at(phases: Sequence[Phase], progress: float) -> Phase | None:
    """Return the phase that a share `progress` (0 to 1) of the tokens falls into; None if there are none."""
    whole = sum(phase.share for phase in phases)
    for phase in phases:
        progress -= phase.share / whole
        if progress < 0:
            return phase
    return phases[-1] if phases else None
