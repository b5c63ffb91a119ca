"""From logits to the next token."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from rmkv_cli.config import Section

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class SamplingConfig(Section):
    """How the next token is drawn. The filters apply in the order in which they stand here."""

    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Divides the positive logits of tokens seen before and multiplies the negative (CTRL; Keskar et al., 2019)."""
    temperature: float = Field(0.8, ge=0, le=100)
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = Field(0, ge=0, lt=2**31)
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Keep the fewest likeliest tokens that hold this much of the probability (Holtzman et al., 2020)."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this share as likely as the likeliest (Nguyen et al., 2024)."""
    seed: Seed = 0


def sampling_defaults() -> dict[str, Any]:
    """Return the sampling defaults of `rmkv generate` under their names in transformers' generation_config.json."""
    config = SamplingConfig()
    names = "temperature", "top_k", "top_p", "repetition_penalty"
    return {"do_sample": True} | {name: getattr(config, name) for name in names}


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator, seen: Tensor) -> Tensor:
    """Return the next tokens (B,) for logits (B, V); `seen` (B, V) marks the tokens of the prompt and the text.

    Logits must be finite, or -inf for tokens that must not be drawn. Every allowed config then gives probabilities.
    """
    if config.temperature == 0:
        return _penalise(logits, config.repetition_penalty, seen).argmax(-1)
    return torch.multinomial(distribution(logits, config, seen), 1, generator=generator).squeeze(-1)


def distribution(logits: Tensor, config: SamplingConfig, seen: Tensor) -> Tensor:
    """Return the probabilities (B, V), float64, that `sample` draws from at a temperature above 0."""
    logits = _penalise(logits, config.repetition_penalty, seen)
    # Subtract the maximum first, so that a tiny temperature leaves the likeliest token at 0 and not at infinity.
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if config.top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= config.top_p
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0)
    if config.min_p > 0:
        least = config.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _penalise(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Return the penalised logits in float64, where no product of a float32 and a penalty overflows."""
    logits = logits.double()
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
