"""The shape of an RMKV model."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rmkv_cli.config.section import Section


class MemoryConfig(Section):
    """The memory that each layer carries through the text, and its update."""

    slots: int = Field(64, ge=0, le=1 << 16)
    """Number of memory slots per layer (m), vectors of width D."""
    cell: Literal["gru", "lstm", "minimal"] = "gru"
    """Recurrent cell that updates the slots."""
    carry: Literal["segments", "layers"] = "segments"
    """Where the updated memory goes. segments: to the same layer of the next segment. layers: to the next layer of the
    same segment, as published; such a model is not causal."""
    update: Literal["carry", "published", "none"] = "carry"
    """Inputs of the cell. carry: hidden state M and input P + Y_M, where P pools X + Y_X. published: hidden state Y_M
    and input P, where P pools Y_X. none: the slots are learned but never updated, as a control."""
    horizon: float = Field(200.0, ge=1)
    """Time scale of the cells in segments: keep-gate biases start as log(Uniform(1, horizon)) (Tallec & Ollivier,
    2018). With 1 they all start at 0."""
    store: int = Field(2, ge=0)
    """Number of layers, from the first, that also have an associative store: a matrix per head that binds keys to
    values. 0: none. More than num_hidden_layers: all."""
    store_key: Literal["previous", "own"] = "previous"
    """Key under which the store writes a token's value: the previous token's or its own. "own" is for models whose
    attention keys already contain the previous token, such as pretrained transformers."""
    store_maps: bool = False
    """Whether the store multiplies attention's queries and keys by a matrix per head, and scales its output per
    head."""
    store_features: int = Field(0, ge=0, le=64)
    """Features of the store's queries and keys: 2 * head width * store_features products of channels (DPFP: Schlag et
    al., 2021). The more, the more values a store holds; its state grows in proportion. 0: the channels themselves."""
    fresh: Literal["visible", "hidden"] = "visible"
    """Whether a document's first segment sees the slots. hidden: the first segment is computed as in a transformer,
    which imported models need."""

    @property
    def updated(self) -> bool:
        """Whether the model has slots that change with the text."""
        return self.slots > 0 and self.update != "none"


class RopeConfig(Section):
    """Rotary positions (RoPE: Su et al., 2021). Low frequencies can be scaled for longer texts than the model was
    pretrained on, as in Llama 3.1."""

    theta: float = Field(10_000.0, gt=1, le=1e12)
    """Base of the frequencies."""
    factor: float = Field(1.0, ge=1, le=1e6)
    """Divisor of the lowest frequencies; 1: no scaling."""
    low_freq_factor: float = Field(1.0, gt=0)
    """Frequencies with at most this many rotations in the original length are divided by `factor`."""
    high_freq_factor: float = Field(4.0, gt=0)
    """Frequencies with at least this many rotations stay unchanged; those in between are interpolated."""
    original_max_position_embeddings: int = Field(8192, ge=1, le=1 << 30)
    """Original length in tokens."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        match fields:
            case {"low_freq_factor": low, "high_freq_factor": high} if low >= high:
                yield f"low_freq_factor = {low} should be below high_freq_factor = {high}"


class QuantizationConfig(Section):
    """Format of a quantized model's matrices. Only model folders from `rmkv quantize` have this section; training
    refuses it."""

    bits: Literal[4, 8] = 8
    """Bits per weight."""
    group_size: Literal[32, 64, 128] = 32
    """Number of weights of a row that share a scale, with 4 bits. With 8 bits, each row has one scale."""
    keep: list[str] = Field([])
    """Layers that are not quantized, by name or the end of a name, such as "embedding"."""


class ModelConfig(Section):
    """The shape of an RMKV; the defaults are the `600m` preset's, but without features of the store's keys.

    Sizes have upper bounds, so that a damaged or hostile config is refused before a model is built. The bounds are
    several times those of the largest published models (width 18,432; 128 layers; a million ids).
    """

    vocab_size: int = Field(32768, ge=8, le=1 << 24)
    """Number of token ids; at least the tokenizer's vocabulary."""
    hidden_size: int = Field(1152, ge=2, le=1 << 17)
    """Width of the token stream (D)."""
    num_hidden_layers: int = Field(24, ge=1, le=1024)
    """Number of layers, each with its own memory."""
    head_size: int = Field(0, ge=0, le=1 << 17)
    """Width of an attention head. 0: hidden_size / num_attention_heads."""
    num_attention_heads: int = Field(9, ge=1, le=4096)
    """Number of query heads of attention and store; must divide hidden_size unless head_size is set."""
    num_key_value_heads: int = Field(0, ge=0, le=4096)
    """Number of key-value heads, each shared by a group of query heads (grouped-query attention: Ainslie et al., 2023).
    The store has one matrix per key-value head. 0: num_attention_heads."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether an RMSNorm is applied to the queries and keys of each head, as in Qwen3."""
    norm: Literal["layer", "rms"] = "layer"
    """Kind of norm: LayerNorm, or RMSNorm (Zhang & Sennrich, 2019) as in Llama."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon that norms add to the variance."""
    intermediate_size: int = Field(3072, ge=0, le=1 << 19)
    """Width of the gated feed-forward. 0: no feed-forward, as published."""
    experts: int = Field(0, ge=0, le=4096)
    """Number of experts per layer beside the feed-forward, which every token passes through: it is their shared expert.
    An expert is a feed-forward that processes only some tokens. 0: none."""
    experts_per_token: int = Field(2, ge=1, le=4096)
    """Number of experts that process each token."""
    expert_size: int = Field(0, ge=0, le=1 << 19)
    """Width of an expert. 0: intermediate_size."""
    segment_length: int = Field(512, ge=1, le=1 << 30)
    """Number of tokens between memory updates (S)."""
    lookback: int = Field(128, ge=0)
    """Number of tokens of the previous segment that are still attended to, 0 to segment_length."""
    position: Literal["rotary", "sinusoidal", "learned"] = "rotary"
    """Kind of position encoding."""
    max_position_embeddings: int = Field(131072, ge=1, le=1 << 30)
    """Number of learned positions. Other kinds of positions are computed and have no limit."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate of embeddings, attention and feed-forward during training."""
    tie_word_embeddings: bool = True
    """Whether the head uses the embeddings' matrix."""
    rope: RopeConfig = RopeConfig()
    memory: MemoryConfig = MemoryConfig()
    quantization: QuantizationConfig | None = None

    @property
    def expert_width(self) -> int:
        """Width of an expert."""
        return self.expert_size or self.intermediate_size

    @property
    def stores(self) -> int:
        """Number of layers that have a store, from the first."""
        return min(self.memory.store, self.num_hidden_layers)

    @property
    def store_key_width(self) -> int:
        """Number of features of the store's keys (p)."""
        return self.head_width * (2 * self.memory.store_features or 1)

    @property
    def head_width(self) -> int:
        """Width of one attention head (d)."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key-value heads, and of the store's matrices."""
        return self.num_key_value_heads or self.num_attention_heads

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
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
            case {"experts": experts, "experts_per_token": chosen} if experts and chosen > experts:
                yield f"experts_per_token = {chosen} is more than experts = {experts}"
        match fields:
            case {"experts": experts, "expert_size": 0, "intermediate_size": 0} if experts:
                yield "experts without a shared feed-forward (intermediate_size = 0) need expert_size"
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
