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
    store_key: Literal["previous", "own"] = "previous"
    """Key under which the store writes a token's value: the previous token's or its own. "own" is for models whose
    attention keys already contain the previous token, such as pretrained transformers."""
    store_maps: bool = False
    """The store multiplies attention's queries and keys by a matrix per head, and scales its output per head."""
    fresh: Literal["visible", "hidden"] = "visible"
    """Whether a document's first segment sees the slots. With "hidden" it is computed as in a transformer; imported
    models need this."""

    @property
    def updated(self) -> bool:
        """Whether there are slots that change with the text."""
        return self.slots > 0 and self.update != "none"


class RopeConfig(Section):
    """Rotary positions (RoPE: Su et al., 2021). Low frequencies can be scaled for texts longer than a model was
    pretrained on, as in Llama 3.1."""

    theta: float = Field(10_000.0, gt=1, le=1e12)
    """Base of the frequencies."""
    factor: float = Field(1.0, ge=1, le=1e6)
    """Divisor of the lowest frequencies; 1: no scaling."""
    low_freq_factor: float = Field(1.0, gt=0)
    """Frequencies with at most this many turns in the original length are divided by `factor`."""
    high_freq_factor: float = Field(4.0, gt=0)
    """Frequencies with at least this many turns are unchanged; those in between are interpolated."""
    original_max_position_embeddings: int = Field(8192, ge=1, le=1 << 30)
    """The original length in tokens."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"low_freq_factor": low, "high_freq_factor": high} if low >= high:
                yield f"low_freq_factor = {low} should be below high_freq_factor = {high}"


class QuantizationConfig(Section):
    """How `rmkv quantize` stored a model's matrices. Only its model folders have this section; training refuses it."""

    bits: Literal[4, 8] = 8
    """Bits per weight."""
    group_size: Literal[32, 64, 128] = 32
    """With 4 bits: number of weights of a row that share a scale. With 8 bits, each row has one scale."""
    keep: list[str] = Field([])
    """Layers that are not quantized, by name or the end of a name, such as "embedding"."""


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
    head_size: int = Field(0, ge=0, le=1 << 17)
    """Width of an attention head. 0: hidden_size / num_attention_heads."""
    num_attention_heads: int = Field(9, ge=1, le=4096)
    """Query heads of attention and store; must divide hidden_size unless head_size is given."""
    num_key_value_heads: int = Field(0, ge=0, le=4096)
    """Heads of keys and values, each shared by a group of query heads (grouped-query attention: Ainslie et al., 2023);
    the store has a matrix for each. 0: num_attention_heads."""
    qkv_bias: bool = False
    """Add biases to queries, keys and values, as in Qwen2."""
    qk_norm: bool = False
    """Apply an RMSNorm to the queries and keys of each head, as in Qwen3."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm (Zhang & Sennrich, 2019) as in Llama."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon that norms add to the variance."""
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
    rope: RopeConfig = RopeConfig()
    memory: MemoryConfig = MemoryConfig()
    quantization: QuantizationConfig | None = None

    @property
    def stores(self) -> int:
        """How many layers have a store: the first ones."""
        return min(self.memory.store, self.num_hidden_layers)

    @property
    def head_width(self) -> int:
        """Width of one attention head (d)."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of heads of keys and values, and of the store's matrices."""
        return self.num_key_value_heads or self.num_attention_heads

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"hidden_size": width, "num_attention_heads": heads, "head_size": 0} if width % heads:
                yield f"num_attention_heads = {heads} does not divide hidden_size = {width}"
            case {"hidden_size": width, "num_attention_heads": heads, "head_size": 0, "position": "rotary"} if (
                width // heads % 2
            ):
                head_size = width // heads
                yield f"rotary positions need an even head width, and hidden_size / num_attention_heads = {head_size}"
            case {"head_size": head_size, "position": "rotary"} if head_size % 2:
                yield f"rotary positions need an even head width, got head_size = {head_size}"
            case {"hidden_size": width, "position": "sinusoidal"} if width % 2:
                yield f"sinusoidal positions need an even hidden_size, got {width}"
        match fields:
            case {"num_attention_heads": heads, "num_key_value_heads": shared} if shared and heads % shared:
                yield f"num_key_value_heads = {shared} does not divide num_attention_heads = {heads}"
        match fields:
            case {"memory": MemoryConfig(carry="layers", fresh="hidden")}:
                yield "memory.fresh = 'hidden' needs memory.carry = 'segments'"
        match fields:
            case {"memory": MemoryConfig(carry="layers", slots=slots, update=update, store=store)} if (
                store or not slots or update == "none"
            ):
                yield "memory.carry = 'layers' needs slots that are updated, and memory.store = 0"
        match fields:
            case {"segment_length": length, "lookback": lookback} if lookback > length:
                yield f"lookback = {lookback} is longer than segment_length = {length}; allowed are 0 to {length}"
