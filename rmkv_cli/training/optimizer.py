"""Optimizers with their parameter groups, the learning rate's schedule, and the number of segments per row."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rmkv_cli.config import Config, Phase, TrainConfig
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapters import ADAPTER_MARK, attach_configured
from rmkv_cli.model.groups import freeze, group_of
from rmkv_cli.training.muon import ShardedMuon
from rmkv_cli.training.stages import stage_at

PROGRESS_GRID = [(i + 0.5) / 1000 for i in range(1000)]  # values of progress, evenly over the tokens


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to a parameter: only to the matrices of attention, feed-forward and experts.

    Gates, routers, norms, embeddings, biases, pooling queries, slots and adapters have none.
    """
    parts = (".attention.", ".feed_forward.", ".feed_forwards.")
    return parameter.ndim == 2 and any(part in name for part in parts) and ADAPTER_MARK not in name


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return torch's parameter groups `matrices`, with weight decay, and `others`, without, with optimizers' names.

    Frozen parameters and empty groups are left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "name": "matrices",
            "optimizer": config.optimizer,
            "params": [p for name, p in named if has_weight_decay(name, p)],
            "weight_decay": config.weight_decay,
        },
        {
            "name": "others",
            "optimizer": "adamw",
            "params": [p for name, p in named if not has_weight_decay(name, p)],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW (Loshchilov & Hutter, 2019) for all trained parameters, or Muon and AdamW.

    If config.optimizer is "muon", Muon (Jordan et al., 2024) trains the matrices and AdamW the others. Muon's updates
    are scaled to the root mean square of AdamW's (Liu et al., 2025), so that both share learning rate and weight decay.
    Each stored matrix is orthogonalized as a whole; queries, keys and values share one, (3D, D).
    """
    groups = parameter_groups(model, config)
    adamw, muon = ([group for group in groups if group["optimizer"] == name] for name in ("adamw", "muon"))
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        betas = config.beta1, config.beta2
        optimizers.append(torch.optim.AdamW(adamw, lr=config.learning_rate, betas=betas, fused=True))
    if muon:
        sharded = isinstance(muon[0]["params"][0], DTensor)
        kind = ShardedMuon if sharded else torch.optim.Muon
        optimizers.append(kind(muon, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def describe_groups(config: Config) -> list[dict[str, Any]]:
    """Return the number of parameters in each group of `train.trainable`, by optimizer and for frozen ones.

    Each row also has the highest learning rate and the weight decay. No weights are allocated.
    """
    with torch.device("meta"):
        model = RMKV(config.model)
        attach_configured(model, config.train)
    freeze(model, config.train.ever_trainable)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    frozen = {"optimizer": None, "weight_decay": None, "params": [p for p in names if not p.requires_grad]}
    rows: dict[tuple[str, str | None, float | None], int] = defaultdict(int)
    for group in [*parameter_groups(model, config.train), frozen]:
        for p in group["params"]:
            rows[group_of(names[p]), group["optimizer"], group["weight_decay"]] += p.numel()
    return [
        {
            "name": name,
            "trained": optimizer is not None,
            "parameters": count,
            "optimizer": optimizer,
            "learning_rate": None if optimizer is None else config.train.learning_rate,
            "weight_decay": weight_decay,
        }
        for (name, optimizer, weight_decay), count in rows.items()
    ]


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Return the learning rate after a share `progress`, 0 to 1, of the tokens of the run or stage.

    The schedule is a linear warm-up, then a half cosine (Loshchilov & Hutter, 2017), or warm-up-stable-decay (Hu et
    al., 2024).
    """
    high, low = config.learning_rate, config.final_learning_rate
    if progress < config.warmup:
        return high * progress / config.warmup
    if config.schedule == "cosine":
        scale = 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))
    else:
        scale = min(1.0, (1 - progress) / config.decay) if config.decay else 1.0
    return low + (high - low) * scale


def row_segments(config: TrainConfig, phases: Sequence[Phase], step: int, progress: float) -> int:
    """Return the number of segments of a step's rows, drawn uniformly from the step's range.

    The phase can set the range. Otherwise the maximum grows from segments_min to segments_max over the first half of
    the run or stage.
    """
    least, most = _segments_range(config, phases, progress)
    return int(np.random.default_rng([config.seed, step]).integers(least, most + 1))


def most_segments(config: TrainConfig, phases: Sequence[Phase], *, with_teacher: bool = False) -> int:
    """Return the number of segments of the longest rows; `with_teacher` counts only rows that a teacher reads."""
    grid = [progress for progress in PROGRESS_GRID if not with_teacher or stage_at(config, progress).kind != "extend"]
    return max((_segments_range(config, phases, progress)[1] for progress in grid), default=0)


def longest_rows(config: Config, phases: Sequence[Phase], *, with_teacher: bool = False) -> int:
    """Return the number of segments of the longest rows, as `most_segments`; for roll-outs, return an estimate."""
    if config.train.rollouts.tasks:
        return math.ceil(config.train.rollouts.longest / config.model.segment_length)
    return most_segments(config.train, phases, with_teacher=with_teacher)


def mean_segments(config: TrainConfig, phases: Sequence[Phase]) -> float:
    """Return the mean number of segments per row over all steps.

    It is the harmonic mean over the tokens, because shorter rows take more steps for the same tokens.
    """
    return harmonic_mean([sum(_segments_range(config, phases, progress)) / 2 for progress in PROGRESS_GRID])


def _segments_range(config: TrainConfig, phases: Sequence[Phase], progress: float) -> tuple[int, int]:
    """Return the minimum and maximum number of segments per row at a share `progress`, 0 to 1, of the tokens."""
    stage = stage_at(config, progress)
    least, most = stage.train.segments_min, stage.train.segments_max
    current_most = round(least + (most - least) * min(1.0, 2 * stage.progress(progress)))
    phase = phase_at(phases, progress)
    if phase is not None:
        least = phase.segments_min or least
        current_most = phase.segments_max or max(least, current_most)
    return min(least, current_most), current_most


def phase_at(phases: Sequence[Phase], progress: float) -> Phase | None:
    """Return the phase at a share `progress`, 0 to 1, of the tokens; None if there are no phases."""
    total = sum(phase.share for phase in phases)
    for phase in phases:
        progress -= phase.share / total
        if progress < 0:
            return phase
    return phases[-1] if phases else None
