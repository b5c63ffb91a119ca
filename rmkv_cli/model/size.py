"""Compute the size of a state from the model's config."""

from rmkv_cli.config import ModelConfig


def state_bytes(config: ModelConfig, element_size: int, window_size: int | None = None) -> tuple[int, int]:
    """Return the bytes of one sequence's state at a segment's boundary, and at most (before a segment's last token).

    Args:
        config: the model's config.
        element_size: bytes per element of slots and stores.
        window_size: bytes per element of keys, values and the token stream; None: `element_size`.
    """
    window_size = window_size or element_size
    D, S, m, lookback = config.hidden_size, config.segment_length, config.memory.slots, config.lookback
    H, G, d = config.num_attention_heads, config.key_value_heads, config.head_width
    memories = 1 if config.memory.carry == "layers" else config.num_hidden_layers
    memory = memories * m * D * (2 if config.memory.updated and config.memory.cell == "lstm" else 1)
    memory += config.stores * G * config.store_key_width * d
    # Each store keeps the last 4 queries and keys.
    window = (2 * config.num_hidden_layers * lookback * G + 4 * config.stores * (H + G)) * d
    inside = config.num_hidden_layers * (2 * G * d + D) * (S - 1) * window_size
    counters = 8 * (5 + 1)  # two owners, document, position, offset, filled
    boundary = memory * element_size + window * window_size + 8 * lookback + counters
    return boundary, boundary + inside + 8 * (S - 1)
