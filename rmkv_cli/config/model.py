"""The shape of an RMKV model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rmkv_cli.config.section import Section


class MemoryConfig(Section):
    """What a layer carries through the text, and how it is updated."""

    slots: int = Field(64, ge=1)
    """Memory vectors a layer (m)."""
    cell: Literal["gru", "lstm", "minimal"] = "gru"
    """The recurrent cell that updates each slot."""
    carry: Literal["segments", "layers"] = "segments"
    """Where the updated memory goes: to the same layer of the next segment, or (as published, and then the
    model is not causal) to the next layer of the same segment."""
    update: Literal["carry", "published"] = "carry"
    """The cell's hidden and input: M and P + Y_M, pooling X + Y_X; or Y_M and P, pooling Y_X."""
    horizon: float = Field(200.0, ge=1)
    """Segments; keep-gate biases start as log(Uniform(1, horizon)) (Tallec & Ollivier, 2018). 1: not spread."""


class ModelConfig(Section):
    """The shape of an RMKV; the defaults are the `600m` preset's."""

    vocab_size: int = Field(32768, ge=8)
    hidden_size: int = Field(1152, ge=2)
    num_hidden_layers: int = Field(24, ge=1)
    num_attention_heads: int = Field(9, ge=1)
    intermediate_size: int = Field(3072, ge=0)
    """Width of the gated feed-forward; 0: none, as published."""
    segment_length: int = Field(512, ge=1)
    """Tokens between memory updates (S)."""
    lookback: int = Field(128, ge=0)
    """Tokens of the previous segment still attended to, 0 to segment_length."""
    position: Literal["rotary", "sinusoidal", "learned"] = "rotary"
    max_position_embeddings: int = Field(131072, ge=1)
    """Rows of the table of learned positions; the other kinds are computed and know no limit."""
    dropout: float = Field(0.0, ge=0, lt=1)
    tie_word_embeddings: bool = True
    memory: MemoryConfig = MemoryConfig()

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = []
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"num_attention_heads = {self.num_attention_heads} does not divide hidden_size = {self.hidden_size}"
            )
        elif self.position == "rotary" and self.head_size % 2:
            problems.append(
                f"rotary positions need an even head width, and hidden_size / num_attention_heads = {self.head_size}"
            )
        if self.position == "sinusoidal" and self.hidden_size % 2:
            problems.append(f"sinusoidal positions need an even hidden_size, got {self.hidden_size}")
        if self.lookback > self.segment_length:
            problems.append(
                f"lookback = {self.lookback} is longer than segment_length = {self.segment_length}; allowed are 0 to "
                f"{self.segment_length}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
