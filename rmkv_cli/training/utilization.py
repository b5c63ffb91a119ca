"""Model FLOPs utilization (MFU): the model's own FLOPs as a share of the device's peak."""

from fnmatch import fnmatch
from typing import Any

import torch

from rmkv_cli.config import Config, ModelConfig
from rmkv_cli.model.cost import forward_flops_per_token

PEAKS = {  # dense bfloat16 FLOPs per second with float32 accumulation, from NVIDIA's data sheets
    "NVIDIA H200": 989e12,  # SXM
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA A100*": 312e12,
    "NVIDIA GeForce RTX 4090": 165e12,  # Ada architecture white paper
    "NVIDIA GeForce RTX 3090": 71e12,  # Ampere GA102 architecture white paper
}
ASSUMED_MFU = 0.4  # for budgets; a run reports its own


def training_flops_per_token(config: ModelConfig) -> float:
    """Return training's FLOPs per token: three forward passes' worth.

    The backward pass counts as two, and recomputation does not count (PaLM: Chowdhery et al., 2022, appendix B).
    """
    return 3 * sum(forward_flops_per_token(config).values())


def training_budget(config: Config) -> dict[str, Any]:
    """Return a training run's tokens, their FLOPs, and the hours on one GPU of each known kind at an assumed MFU."""
    tokens = config.train.tokens
    flops = training_flops_per_token(config.model) * tokens
    hours = {
        name.removeprefix("NVIDIA ").rstrip("*"): flops / (ASSUMED_MFU * peak) / 3600 for name, peak in PEAKS.items()
    }
    return {"tokens": tokens, "flops": flops, "assumed_mfu": ASSUMED_MFU, "hours": hours}


def peak_flops(name: str) -> float | None:
    """Return the bfloat16 peak in FLOPs per second of the GPU that torch calls `name`; None if unknown."""
    return next((peak for pattern, peak in PEAKS.items() if fnmatch(name, pattern)), None)


def device_peak(device: str, precision: str) -> float | None:
    """Return the peak in FLOPs per second of "cpu" or "cuda" in a configured precision; None if unknown."""
    return peak_flops(torch.cuda.get_device_name()) if (device, precision) == ("cuda", "bf16") else None
