"""Reading documents through a model, each from its start, batched by length and one segment at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.model import RMKV, State

LOGITS = 2048  # positions whose logits (V each) are in memory at once

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One segment of the documents in a batch that have not ended; the padding of shorter ones is not scored."""

    inputs: Tensor
    """Tokens (B, T) int64 of the last B documents of the batch, the others having ended; T is at most a segment."""
    targets: Tensor
    """Scored tokens to predict (N,) int64. The last one of a document is the end-of-document token."""
    rows: Integers
    """Row of `inputs` that each target belongs to (N,)."""
    columns: Integers
    """Column of `inputs` that predicts each target (N,)."""
    start: int
    """Position of the segment's first token within each document."""
    read: int
    """Number of tokens of `inputs` that are not padding."""


def steps(
    documents: Sequence[NDArray[np.integer]],
    lengths: Integers,
    eod: int,
    model: RMKV,
    counted: Sequence[NDArray[np.bool_] | None] | None = None,
) -> Iterator[Step]:
    """Yield the segments of the first `lengths` tokens of a batch of documents, shortest first, from their starts.

    `counted` has for each document which targets are scored, as `Documents.counted` returns it; without it, all are.
    """
    S, device = model.config.segment_length, model.memory.device
    for start in range(0, int(lengths[-1]), S):
        ended = int(np.searchsorted(lengths, start, side="right"))
        left = lengths[ended:] - start
        width = min(S, int(left[-1]))
        ids = np.full((len(left), width + 1), eod)
        for row, tokens in zip(ids, documents[ended:], strict=True):
            part = tokens[start : start + width + 1]
            row[: len(part)] = part
        scored = np.arange(width) < left[:, None]
        read = int(scored.sum())
        for row, counts in zip(scored, counted[ended:] if counted else (), strict=bool(counted)):
            if counts is not None:
                counts = counts[start : start + width]
                row[: len(counts)] &= counts
        rows, columns = np.nonzero(scored)
        targets = torch.from_numpy(ids[rows, columns + 1]).to(device)
        yield Step(torch.from_numpy(ids[:, :-1]).to(device), targets, rows, columns, start, read)


def continuing(state: State, step: Step) -> State:
    """Return the state of the documents of a batch that continue in `step`."""
    n = len(step.inputs)
    return state.map(lambda x, batch: x.narrow(batch, x.shape[batch] - n, n))


def token_losses(model: RMKV, hidden: Tensor, step: Step) -> Tensor:
    """Return the loss of each target, (N,) float64 in nats, given the hidden states (B, T, D)."""
    device = hidden.device
    hidden = hidden[torch.from_numpy(step.rows).to(device), torch.from_numpy(step.columns).to(device)]
    parts = zip(hidden.split(LOGITS), step.targets.split(LOGITS), strict=True)
    return torch.cat([F.cross_entropy(model.head(h).float(), t, reduction="none") for h, t in parts]).double()


def batches(lengths: Integers, batch_tokens: int, model: RMKV) -> Iterator[Integers]:
    """Yield batches of indices of `lengths`, shortest documents first, with at most `batch_tokens` per segment.

    For a model that is not causal, all documents of a batch have the same length, as tokens would see padding.
    """
    S, causal = model.config.segment_length, model.config.memory.carry == "segments"
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable"):
        full = (len(batch) + 1) * min(S, lengths[index]) > batch_tokens
        if batch and (full or (not causal and lengths[index] != lengths[batch[0]])):
            yield np.array(batch)
            batch = []
        batch.append(int(index))
    if batch:
        yield np.array(batch)


def require_fits(model: RMKV, vocab_size: int, longest: int) -> None:
    """Raise `UserError` if documents have ids or positions that the model lacks."""
    config = model.config
    if vocab_size > config.vocab_size:
        raise UserError(
            f"the data has a vocabulary of {vocab_size} tokens, the model only {config.vocab_size}; prepare the data "
            "with the model's tokenizer.json"
        )
    if config.position == "learned" and longest > config.max_position_embeddings:
        raise UserError(
            f"a document has {longest} tokens, but the model's learned positions end at "
            f"{config.max_position_embeddings} (max_position_embeddings)"
        )
