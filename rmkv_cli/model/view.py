"""Who sees whom while tokens of one segment are read: masks and rotations that all layers share, made once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmkv_cli.config import ModelConfig
from rmkv_cli.model.positions import Rotation, rotation
from rmkv_cli.model.precision import widened

TAPS = 4  # tokens that the store's short convolution sees
CHUNK = 64  # tokens that the store takes in at once


@dataclass(frozen=True)
class View:
    """What the T tokens of a call see, in N chunks of C for the store.

    The queries are those of the slots, where the memory is updated, and the tokens'. The K keys are those of the slots,
    of the n remembered tokens (look-back, then the open segment's), and of the T tokens. Where some row is mixed, its
    tokens being of several documents, other slots come before the slots: learned ones if the last document wrote the
    memory, else the memory.
    """

    ends: bool
    """The tokens are the segment's last: the memory is updated."""
    mixed: bool
    """Some row has tokens of several documents."""
    has_memory: Tensor
    """(B, 1, 1), True: the last document wrote the memory, so its slots are that; else they are the learned ones."""
    mask: Tensor
    """(B, 1, queries, K), added to attention's scores: 0 where a key is seen, -inf where it is not."""
    pooling_mask: Tensor
    """(B, 1, t), added to the pooling's scores of the open segment's tokens: 0 for the last document's, else -inf."""
    rope: Rotation | None
    """Rotation of slots (angle 0) and tokens (by their offset in the segment), (B, slots + T, 1, d)."""
    rope_shift: Rotation | None
    """Rotation that takes the look-back's keys from this segment's offsets to the next one's, (B, 1, 1, d)."""
    wrote_store: Tensor | None
    """(B, 1, 1, 1), True: the first token's document wrote the store; None: it is so in all rows."""
    recent: Tensor
    """(B, 4, 1, 1): 1 where the token four to one before the first one belongs to the same document, else 0."""
    until: Tensor | float = 1.0
    """(C, C), or (N, B * G, C, C) if mixed: 1 where a token reads what another (or itself) wrote, else 0."""
    earlier: Tensor | float = 0.0
    """The same, itself not included."""
    near: Tensor | None = None
    """If mixed, (5, B, T, 1, 1): 1 where the token four to zero positions before is in the same document, else 0."""
    later: Tensor | float = 0.0
    """If mixed, (N, B * G, C, 1): 1 where a token's document began after the chunk did, else 0."""
    of_last: Tensor | float = 1.0
    """If mixed, (N, B * G, C, 1): 1 where a token belongs to the chunk's last document, else 0."""
    goes_on: tuple[Tensor, ...] = ()
    """If mixed, (B * G, 1, 1) for each chunk: True where its last document is also its first."""
    place: tuple[Tensor, Tensor] | None = None
    """If keys, values and stream are buffers, and the slots' keys and values are in them: where the one token's belong,
    in keys and values (B, H, 1, d), and in the stream (B, 1, D). None: what is read is put behind what is there."""


def view_of(
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
    ends: bool,
    mixed: bool,
) -> View:
    """Return the view of T tokens.

    Args:
        config: the model's.
        dtype: of the token stream.
        document_ids: (B, T), the tokens' documents.
        documents: (B, n + T), those of all tokens, remembered or read.
        owner: (B,), the document that wrote the slots.
        store_owner: (B,), the document that wrote the store.
        position: (B, T), how many tokens of its document stand before each.
        offset: (B, T), how many of them in its segment.
        filled: tokens of the segment, the new ones included.
        ends: whether they are its last.
        mixed: whether they are of several documents in some row.
    """
    m = config.memory.slots
    owned = document_ids == owner[:, None]
    reads = owned & config.memory.updated
    of_last = documents[:, -filled:] == document_ids[:, -1:]
    rotary = config.position == "rotary"
    rope = rope_shift = None
    if rotary:
        cos, sin = rotation(config, F.pad(offset, (m * (1 + mixed), 0)), dtype)
        rope = cos[:, :, None], sin[:, :, None]
        cos, sin = rotation(config, -offset[:, -1:] - 1, dtype)
        rope_shift = cos[:, None], sin[:, None]
    return View(
        ends=ends,
        mixed=mixed,
        has_memory=reads[:, -1:, None],
        mask=_added(_seen(config, document_ids, documents, owned, of_last, ends, mixed), dtype)[:, None],
        pooling_mask=_added(of_last, dtype)[:, None],
        rope=rope,
        rope_shift=rope_shift,
        wrote_store=(store_owner == document_ids[:, 0])[:, None, None, None],
        recent=recent_of(position[:, 0], dtype),
        **(_store_view(document_ids, position, config.key_value_heads, dtype, mixed) if config.stores else {}),
    )


def recent_of(position: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `View.recent` for a first token at this position of its document (B,)."""
    back = torch.arange(TAPS, 0, -1, device=position.device)
    return (position[:, None] >= back)[:, :, None, None].to(dtype)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _seen(
    config: ModelConfig,
    document_ids: Tensor,
    documents: Tensor,
    owned: Tensor,
    of_last: Tensor,
    ends: bool,
    mixed: bool,
) -> Tensor:
    """Return which keys each query sees, (B, queries, K)."""
    T, n = document_ids.shape[1], documents.shape[1] - document_ids.shape[1]
    m = config.memory.slots
    same = document_ids[:, :, None] == documents[:, None]
    reads = owned & config.memory.updated
    on_slots = reads == reads[:, -1:]
    slots = [~on_slots, on_slots] if mixed else [on_slots]
    if config.memory.fresh == "hidden":
        slots = [x & owned for x in slots]
    slots = [x[:, :, None].expand(-1, -1, m) for x in slots]
    by_tokens = torch.cat([*slots, same[:, :, :n], same[:, :, n:].tril()], dim=2)
    if not (ends and config.memory.updated):
        return by_tokens
    tokens = F.pad(of_last, (n + T - of_last.shape[1], 0))
    # A slot sees all slots of its document, whether or not tokens do.
    by_slots = torch.cat([F.pad(tokens.new_ones(len(tokens), m), (m * mixed, 0)), tokens], dim=1)
    return torch.cat([by_slots[:, None].expand(-1, m, -1), by_tokens], dim=1)


def _store_view(document_ids: Tensor, position: Tensor, heads: int, dtype: torch.dtype, mixed: bool) -> dict[str, Any]:
    T, dtype = document_ids.shape[1], widened(dtype)
    C = min(T, CHUNK)
    if C == 1:
        return {}
    if not mixed:
        until = torch.ones(C, C, dtype=dtype, device=position.device).tril()
        return {"until": until, "earlier": until.tril(-1)}
    back = torch.arange(TAPS, -1, -1, device=position.device)[:, None, None]
    documents = torch.cat([document_ids, document_ids[:, -1:].expand(-1, -T % C)], dim=1).unflatten(1, (-1, C))
    documents = documents.transpose(0, 1).repeat_interleave(heads, dim=1)  # (N, B * G, C)
    first, last = torch.cat([documents[:1, :, :1], documents[:-1, :, -1:]]), documents[:, :, -1:]
    until = (documents[..., None] == documents[..., None, :]).to(dtype).tril()
    return {
        "until": until,
        "earlier": until.tril(-1),
        "near": (position >= back)[..., None, None].to(dtype),
        "later": (documents != first)[..., None].to(dtype),
        "of_last": (documents == last)[..., None].to(dtype),
        "goes_on": (first == last)[..., None].unbind(),
    }
