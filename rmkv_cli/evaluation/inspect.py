"""Inspection of each layer's memory on a text: its half-life, effective rank, attention and value."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.measure import choose
from rmkv_cli.evaluation.reading import require_fits, steps, token_losses
from rmkv_cli.evaluation.watch import Watched, watch
from rmkv_cli.model import RMKV, RMKVBlock, State, inference
from rmkv_cli.tokenizer import Tokenizer

CARRIED = ("memory", "cell", "store")  # parts of a `State` that are memory, each (layers that have one, B, ...)
TOP = 5  # tokens reported for each query


@dataclass(frozen=True)
class Attention:
    """Attention of a query to a token, at any place in the segment."""

    token: str
    mass: float
    """Share of the attention, averaged over the segments."""
    share: float
    """Share of the text that is this token, which is also the mass that uniform attention gives it."""


@dataclass(frozen=True)
class Slot:
    """One memory vector of a layer.

    A channel's half-life is ln 2 / -mean(ln z) segments, with z the keep gate's values on the text (GRU's update gate,
    LSTM's forget gate, MinimalRNN's gate). Without new writes, the product of n gates remains of a channel after n
    updates, so after that many segments half remains. Writes of the candidate are not counted.
    """

    half_life: float | None
    """Median over the channels; None with memory.update = "published", where the gate keeps no memory."""
    half_life_of_longest: float | None
    """Half-life that a tenth of the channels reach."""
    on_memory: float
    """Share of its query's attention that goes to the slots; the rest goes to the segment's tokens."""
    attends: list[Attention]
    """Tokens that its query, which reads the segment at its end, attends to most."""
    pools: list[Attention]
    """Tokens that its query in the pooling attends to most."""


@dataclass(frozen=True)
class Store:
    """A layer's associative store."""

    half_life: list[float]
    """Half-life of each head in segments: ln 2 / -mean(ln (1 - b)) p / S, with b the tokens' write strengths. A token
    multiplies the store by I - b k k^T, whose determinant is 1 - b, so this is the mean over all directions. The value
    of a key that resembles no later key lasts longer."""
    effective_rank: list[float]
    """Effective rank of each head's matrix (p, d)."""


@dataclass(frozen=True)
class LayerMemory:
    """One layer's memory. Effective ranks are averages over the ends of the segments."""

    slots: list[Slot]
    """Empty if there are no slots or the model never updates them."""
    effective_rank: float | None
    """Effective rank of the slots' matrix (m, D): how many orthogonal slots it is worth. None without slots."""
    store: Store | None
    cost_without: float
    """Increase of the loss, in nats per token, if only this layer's memory is reset at every segment's start."""


@dataclass(frozen=True)
class MemoryReport:
    """State and value of the memory on a text."""

    documents: int
    segments: int
    """Number of whole segments, over which everything but losses is measured."""
    tokens: int
    """Number of tokens after the first segment of their document, over which losses are measured."""
    loss: float
    """Nats per token."""
    cost_without: float
    """Increase of the loss, in nats per token, if all memory is reset at every segment's start; the look-back stays."""
    layers: list[LayerMemory]


def inspect_memory(
    model: RMKV,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> MemoryReport:
    """Measure each layer's memory on documents, each read alone and from its start.

    A batch reads each document with all memory, without each single layer's memory, and without any.

    Args:
        model: the model; its training mode is restored.
        documents: documents to read; those of at most a segment are left out.
        tokenizer: the model's tokenizer, for the names of tokens.
        max_tokens: maximum number of tokens to read (see `choose`).
        advance: progress callback, called with the number of tokens just read.

    Raises:
        UserError: no document is longer than a segment, they do not fit the model, or the model is not causal.
    """
    S, L = model.config.segment_length, len(model.blocks)
    if model.config.memory.carry == "layers":
        raise UserError(
            "the memory of a model that is not causal (memory.carry = 'layers') cannot be measured by layer"
        )
    long = np.flatnonzero(documents.lengths > S)
    if len(long):
        chosen, lengths = choose(documents.lengths[long], max_tokens)
        chosen, lengths = long[chosen[lengths > S]], lengths[lengths > S]
    if not len(long) or not len(chosen):
        raise UserError(f"the memory has an effect only in texts of more than a segment ({S} tokens); use longer ones")
    require_fits(model, documents.vocab_size, int(lengths.max()))

    device = model.memory.device
    texts = [documents.part(int(i), 0, length + 1) for i, length in zip(chosen, lengths, strict=True)]
    kinds = np.unique(np.concatenate(texts))
    rows = L + 2  # with all memory, without each layer's, without any
    forgotten = torch.zeros(L, rows, dtype=torch.bool, device=device)
    forgotten[:, 1:-1] = torch.eye(L, dtype=torch.bool)
    forgotten[:, -1] = True
    fresh = model.initial_state(rows)
    nats = torch.zeros(rows, dtype=torch.float64, device=device)
    with inference(model), watch(model, len(kinds)) as watched:
        for text, length in zip(texts, lengths, strict=True):
            state = fresh
            for step in steps([text] * rows, np.full(rows, length), documents.eod, model):
                watched.read(torch.from_numpy(np.searchsorted(kinds, text[step.start : step.start + S])).to(device))
                if step.start:
                    state = _forget(state, fresh, forgotten)
                hidden, state = model.hidden(step.inputs, state)
                if step.start:
                    nats.index_add_(0, torch.from_numpy(step.rows).to(device), token_losses(model, hidden, step))
                if not state.filled:
                    watched.close(state)
                advance(step.inputs.shape[1])
    tokens = int((lengths - S).sum())
    losses = (nats / tokens).tolist()
    costs = [loss - losses[0] for loss in losses[1:]]
    names = [tokenizer.token_bytes(int(i)).decode("utf-8", "backslashreplace") for i in kinds]
    layers = [_layer(model, i, watched, names, costs[i]) for i in range(L)]
    return MemoryReport(len(texts), watched.segments, tokens, losses[0], costs[-1], layers)


def _forget(state: State, fresh: State, forgotten: Tensor) -> State:
    """Return the state with the memory of layer l and row b reset to a document's start where `forgotten` (L, B)."""
    changed: dict[str, Any] = {}
    for name in CARRIED:
        if (x := getattr(state, name)) is not None:
            where = forgotten[: len(x)].view(*x.shape[:2], *[1] * (x.ndim - 2))
            changed[name] = torch.where(where, getattr(fresh, name), x)
    return replace(state, **changed)


def _layer(model: RMKV, index: int, watched: Watched, names: list[str], cost: float) -> LayerMemory:
    """Return the report on a layer; `names` has the name of each kind of token."""
    block, memory = model.blocks[index], model.config.memory
    assert isinstance(block, RMKVBlock)
    share = watched.counts / watched.counts.sum()
    half_lives = _half_life(watched.log_keep[index] / watched.segments)
    slots = [
        Slot(
            half_life=float(channels.median()) if memory.update == "carry" else None,
            half_life_of_longest=float(channels.quantile(0.9)) if memory.update == "carry" else None,
            on_memory=float(watched.on_memory[index, j]) / watched.segments,
            attends=_most(watched.attended[index, j] / watched.segments, share, names),
            pools=_most(watched.pooled[index, j] / watched.segments, share, names),
        )
        for j, channels in enumerate(half_lives if memory.updated else ())
    ]
    store = None
    if block.store is not None:
        kept = _half_life(watched.log_left[index] / watched.segments)
        store = Store(kept.tolist(), (watched.store_ranks[index] / watched.segments).tolist())
    rank = float(watched.slot_ranks[index]) / watched.segments if memory.slots else None
    return LayerMemory(slots, rank, store, cost)


def _half_life(log_keep: Tensor) -> Tensor:
    return math.log(2) / -log_keep


def _most(mass: Tensor, share: Tensor, names: list[str]) -> list[Attention]:
    """Return the TOP tokens with the largest mass (U,)."""
    most = mass.topk(min(TOP, len(names)))
    pairs = zip(most.values.tolist(), most.indices.tolist(), strict=True)
    return [Attention(names[kind], value, float(share[kind])) for value, kind in pairs]
