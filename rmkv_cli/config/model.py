"""The shape of an RMKV model."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section


class MemoryConfig(Section):
    """What a layer carries through the text, and how it is updated."""

    slots: int = Field(64, ge=0, le=1 << 16)
    """Memory vectors per layer (m)."""
    cell: Literal["gru", "lstm", "minimal"] = "gru"
    """The recurrent cell that updates each slot."""
    carry: Literal["segments", "layers"] = "segments"
    """Where the updated memory goes: to the same layer of the next segment, or (as published, and then the
    model is not causal) to the next layer of the same segment."""
    update: Literal["carry", "published", "none"] = "carry"
    """The cell's hidden and input: M and P + Y_M, pooling X + Y_X; or Y_M and P, pooling Y_X. none: the slots stay as
    they were learned, whatever the text: a control."""
    horizon: float = Field(200.0, ge=1)
    """Segments; keep-gate biases start as log(Uniform(1, horizon)) (Tallec & Ollivier, 2018). 1: not spread."""
    store: int = Field(2, ge=0)
    """Layers, from the first, that have an associative store beside the slots: a matrix a head that holds values under
    keys. 0: none; more than there are: all."""

    @property
    def updated(self) -> bool:
        """Whether there are slots that change with the text."""
        return self.slots > 0 and self.update != "none"


class ModelConfig(Section):
    """The shape of an RMKV; the defaults are the `600m` preset's.

    Sizes have upper bounds, so that a damaged or hostile config is refused before a model is built. The bounds are
    several times the sizes of the largest published models (width 18,432; 128 layers; a million ids).
    """

    vocab_size: int = Field(32768, ge=8, le=1 << 24)
    """Number of token ids, at least the tokenizer's."""
    hidden_size: int = Field(1152, ge=2, le=1 << 17)
    """Width of the token stream (D)."""
    num_hidden_layers: int = Field(24, ge=1, le=1024)
    """Layers, each with a memory of its own."""
    num_attention_heads: int = Field(9, ge=1, le=4096)
    """Heads of attention, and of the store; they divide hidden_size."""
    intermediate_size: int = Field(3072, ge=0, le=1 << 19)
    """Width of the gated feed-forward; 0: none, as published."""
    segment_length: int = Field(512, ge=1, le=1 << 30)
    """Tokens between memory updates (S)."""
    lookback: int = Field(128, ge=0)
    """Tokens of the previous segment still attended to, 0 to segment_length."""
    position: Literal["rotary", "sinusoidal", "learned"] = "rotary"
    """How attention knows the tokens' order."""
    max_position_embeddings: int = Field(131072, ge=1, le=1 << 30)
    """Rows of the table of learned positions; other kinds of positions are computed and have no limit."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of embeddings, attention and feed-forward, in training."""
    tie_word_embeddings: bool = True
    """The output layer is the embeddings' matrix."""
    memory: MemoryConfig = MemoryConfig()

    @property
    def stores(self) -> int:
        """How many layers have a store: the first ones."""
        return min(self.memory.store, self.num_hidden_layers)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"hidden_size": width, "num_attention_heads": heads} if width % heads:
                yield f"num_attention_heads = {heads} does not divide hidden_size = {width}"
            case {"hidden_size": width, "num_attention_heads": heads, "position": "rotary"} if width // heads % 2:
                head_size = width // heads
                yield f"rotary positions need an even head width, and hidden_size / num_attention_heads = {head_size}"
            case {"hidden_size": width, "position": "sinusoidal"} if width % 2:
                yield f"sinusoidal positions need an even hidden_size, got {width}"
        match fields:
            case {"memory": MemoryConfig(carry="layers", slots=slots, update=update, store=store)} if (
                store or not slots or update == "none"
            ):
                yield "memory.carry = 'layers' needs slots that are updated, and memory.store = 0"
        match fields:
            case {"segment_length": length, "lookback": lookback} if lookback > length:
                yield f"lookback = {lookback} is longer than segment_length = {length}; allowed are 0 to {length}"
