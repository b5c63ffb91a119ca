"""The settings of sampling."""

from typing import Annotated, Any

from pydantic import Field

from rmkv_cli.config import Section

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class SamplingConfig(Section):
    """Settings of sampling, in the order in which they apply."""

    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Divisor of the positive, factor of the negative logits of tokens seen before (CTRL; Keskar et al., 2019)."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Amount subtracted from a token's logit for each time that the token was generated (OpenAI's definition)."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Amount subtracted from the logit of every token that was generated at least once (OpenAI's definition)."""
    no_repeat_ngram: int = Field(0, ge=0, lt=2**31)
    """Length of the sequences of tokens that are generated at most once (Paulus et al., 2017); 0: no limit."""
    temperature: float = Field(0.8, ge=0, le=100)
    """Divisor of the logits; 0: always the likeliest token."""
    top_k: int = Field(0, ge=0, lt=2**31)
    """Number of likeliest tokens to keep; 0: all."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Probability that the fewest likeliest tokens kept must reach together (Holtzman et al., 2020)."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Lowest probability to keep, as a share of the likeliest token's (Nguyen et al., 2024)."""
    seed: Seed = 0


def sampling_defaults() -> dict[str, Any]:
    """Return the sampling defaults of `rmkv generate` under their names in transformers' generation_config.json."""
    config = SamplingConfig()
    names = "temperature", "top_k", "top_p", "repetition_penalty"
    return {"do_sample": True} | {name: getattr(config, name) for name in names}
