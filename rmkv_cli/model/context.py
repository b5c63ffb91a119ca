"""Masks and rotations that all layers share while they read tokens of one segment."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.positions import Rotation, rotation
from rmkv_cli.model.precision import wide_dtype

TAPS = 4  # tokens covered by the store's short convolution
CHUNK = 64  # tokens that the store processes at once


@dataclass(frozen=True)
class SegmentContext:
    """Masks and rotations for the T tokens of one call. The store processes them in N chunks of C tokens.

    The queries are those of the slots, if the call updates them, and of the tokens. The K keys are those of the slots,
    of the n remembered tokens (look-back, then the open segment), and of the T tokens. If a row is mixed, a second set
    of slots precedes the slots: the learned slots if the last document wrote the memory, else the memory.
    """

    ends_segment: bool
    """Whether the tokens are the last of their segment, so that the memory is updated."""
    mixed: bool
    """Whether some row has tokens of several documents."""
    has_memory: Tensor
    """Whether the last document wrote the memory, (B, 1, 1); if not, it sees the learned slots."""
    mask: Tensor
    """Additive attention mask, (B, 1, queries, K): 0 where a query sees a key, else -inf."""
    pooling_mask: Tensor
    """Additive mask of the open segment's t tokens, (B, 1, t): 0 for the last document's tokens, else -inf."""
    rope: Rotation | None
    """Rotation of slots (angle 0) and tokens (by their offset in the segment), (B, slots + T, 1, d)."""
    rope_shift: Rotation | None
    """Rotation of the look-back's keys from offsets in this segment to offsets in the next one, (B, 1, 1, d)."""
    has_store: Tensor | None
    """Whether the first token's document wrote the store, (B, 1, 1, 1); None: it did in every row."""
    recent_mask: Tensor
    """Mask of the four tokens before the call, oldest first, (B, 4, 1, 1): 1 in the first token's document, else 0."""
    store_mask: Tensor | float = 1.0
    """Causal mask within a chunk, (C, C), or (N, B * G, C, C) if mixed: 1 where a token reads another's write."""
    strict_store_mask: Tensor | float = 0.0
    """`store_mask` without the diagonal."""
    convolution_mask: Tensor | None = None
    """If mixed, mask of the tokens four to zero positions back, (5, B, T, 1, 1): 1 in the same document, else 0."""
    after_boundary: Tensor | float = 0.0
    """If mixed, (N, B * G, C, 1): 1 for a token whose document began inside its chunk, else 0."""
    in_last_document: Tensor | float = 1.0
    """If mixed, (N, B * G, C, 1): 1 for a token of its chunk's last document, else 0."""
    same_document: tuple[Tensor, ...] = ()
    """If mixed, whether a chunk ends in the document that it began in, (B * G, 1, 1) per chunk."""
    write_index: tuple[Tensor, Tensor, Tensor] | None = None
    """Where to write the one token of each row, (B,) each: the row of the buffers, its place among their keys and
    values, which already include the slots', and its place in the stream. None: without buffers, tokens are appended.
    """


def make_context(
    config: ModelConfig,
    dtype: torch.dtype,
    document_ids: Tensor,
    documents: Tensor,
    owner: Tensor,
    store_owner: Tensor,
    position: Tensor,
    offset: Tensor,
    filled: int,
    *,
    ends_segment: bool,
    mixed: bool,
) -> SegmentContext:
    """Return the context of T tokens.

    Args:
        config: the model's config.
        dtype: the type of the token stream.
        document_ids: the tokens' documents, (B, T).
        documents: the documents of remembered tokens and of these, (B, n + T).
        owner: the document that wrote the slots, (B,).
        store_owner: the document that wrote the store, (B,).
        position: the number of tokens before each one in its document, (B, T).
        offset: the same within the segment, (B, T).
        filled: the number of tokens in the segment, these included.
        ends_segment: whether these are its last.
        mixed: whether some row has tokens of several documents.
    """
    m = config.memory.slots
    owned = document_ids == owner[:, None]
    reads = owned & config.memory.updated
    in_last_document = documents[:, -filled:] == document_ids[:, -1:]
    rope = rope_shift = None
    if config.position == "rotary":
        cos, sin = rotation(config, F.pad(offset, (m * (1 + mixed), 0)), dtype)
        rope = cos[:, :, None], sin[:, :, None]
        cos, sin = rotation(config, -offset[:, -1:] - 1, dtype)
        rope_shift = cos[:, None], sin[:, None]
    visible = _visible_keys(config, document_ids, documents, owned, in_last_document, ends_segment, mixed)
    return SegmentContext(
        ends_segment=ends_segment,
        mixed=mixed,
        has_memory=reads[:, -1:, None],
        mask=_additive(visible, dtype)[:, None],
        pooling_mask=_additive(in_last_document, dtype)[:, None],
        rope=rope,
        rope_shift=rope_shift,
        has_store=(store_owner == document_ids[:, 0])[:, None, None, None],
        recent_mask=make_recent_mask(position[:, 0], dtype),
        **(_store_masks(document_ids, position, config.key_value_heads, dtype, mixed) if config.stores else {}),
    )


def make_recent_mask(position: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `SegmentContext.recent_mask`, (B, 4, 1, 1), for the first token's position in its document (B,)."""
    distance = torch.arange(TAPS, 0, -1, device=position.device)
    return (position[:, None] >= distance)[:, :, None, None].to(dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to attention scores: 0 where `visible`, else -inf."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _visible_keys(
    config: ModelConfig,
    document_ids: Tensor,
    documents: Tensor,
    owned: Tensor,
    in_last_document: Tensor,
    ends_segment: bool,
    mixed: bool,
) -> Tensor:
    """Return which keys each query sees, (B, queries, K)."""
    T, n = document_ids.shape[1], documents.shape[1] - document_ids.shape[1]
    m = config.memory.slots
    same_document = document_ids[:, :, None] == documents[:, None]
    reads = owned & config.memory.updated
    like_last = reads == reads[:, -1:]
    slots = [~like_last, like_last] if mixed else [like_last]
    if config.memory.fresh == "hidden":
        slots = [x & owned for x in slots]
    slots = [x[:, :, None].expand(-1, -1, m) for x in slots]
    by_tokens = torch.cat([*slots, same_document[:, :, :n], same_document[:, :, n:].tril()], dim=2)
    if not (ends_segment and config.memory.updated):
        return by_tokens
    tokens = F.pad(in_last_document, (n + T - in_last_document.shape[1], 0))
    # A slot sees all slots of its document, even where `fresh = "hidden"` hides them from tokens.
    by_slots = torch.cat([F.pad(tokens.new_ones(len(tokens), m), (m * mixed, 0)), tokens], dim=1)
    return torch.cat([by_slots[:, None].expand(-1, m, -1), by_tokens], dim=1)


def _store_masks(document_ids: Tensor, position: Tensor, heads: int, dtype: torch.dtype, mixed: bool) -> dict[str, Any]:
    """Return the fields of `SegmentContext` that the store alone uses and that differ from their defaults."""
    T, dtype = document_ids.shape[1], wide_dtype(dtype)
    C = min(T, CHUNK)
    if C == 1:
        return {}
    if not mixed:
        causal = torch.ones(C, C, dtype=dtype, device=position.device).tril()
        return {"store_mask": causal, "strict_store_mask": causal.tril(-1)}
    distance = torch.arange(TAPS, -1, -1, device=position.device)[:, None, None]
    documents = torch.cat([document_ids, document_ids[:, -1:].expand(-1, -T % C)], dim=1).unflatten(1, (-1, C))
    documents = documents.transpose(0, 1).repeat_interleave(heads, dim=1)  # (N, B * G, C)
    first, last = torch.cat([documents[:1, :, :1], documents[:-1, :, -1:]]), documents[:, :, -1:]
    causal = (documents[..., None] == documents[..., None, :]).to(dtype).tril()
    return {
        "store_mask": causal,
        "strict_store_mask": causal.tril(-1),
        "convolution_mask": (position >= distance)[..., None, None].to(dtype),
        "after_boundary": (documents != first)[..., None].to(dtype),
        "in_last_document": (documents == last)[..., None].to(dtype),
        "same_document": (first == last)[..., None].unbind(),
    }
