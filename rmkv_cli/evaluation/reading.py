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

LOGITS = 2048  # positions whose logits (V each) are held at once

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One segment of the documents of a batch that are still going on; what pads the shorter ones is not scored."""

    inputs: Tensor
    """(B, T) int64, T at most a segment. The batch's first documents may have ended: these are its last B."""
    targets: Tensor
    """(N,) int64: the tokens to predict that count. A document's last one is the end-of-document token."""
    rows: Integers
    """(N,): which row of `inputs` each target belongs to."""
    columns: Integers
    """(N,): the place within the segment that predicts it."""
    start: int
    """Position of the segment's first token within each document."""
    read: int
    """Tokens of `inputs` that are no padding."""


def steps(
    documents: Sequence[NDArray[np.integer]],
    lengths: Integers,
    eod: int,
    model: RMKV,
    counted: Sequence[NDArray[np.bool_] | None] | None = None,
) -> Iterator[Step]:
    """Yield the segments of the first `lengths` tokens of a batch of documents, shortest first, from their starts.

    `counted` tells of each document which of its targets count, as `Documents.counted` does; all do without it.
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
        for live, its in zip(scored, counted[ended:] if counted else (), strict=bool(counted)):
            if its is not None:
                its = its[start : start + width]
                live[: len(its)] &= its
        rows, columns = np.nonzero(scored)
        targets = torch.from_numpy(ids[rows, columns + 1]).to(device)
        yield Step(torch.from_numpy(ids[:, :-1]).to(device), targets, rows, columns, start, read)


def going_on(state: State, step: Step) -> State:
    """Return the state of those documents of a batch that go on in `step`."""
    n = len(step.inputs)
    return state.map(lambda x, batch: x.narrow(batch, x.shape[batch] - n, n))


def token_losses(model: RMKV, hidden: Tensor, step: Step) -> Tensor:
    """Return the loss of each target, (N,) float64 in nats, for what the model's head reads, (B, T, D)."""
    device = hidden.device
    hidden = hidden[torch.from_numpy(step.rows).to(device), torch.from_numpy(step.columns).to(device)]
    parts = zip(hidden.split(LOGITS), step.targets.split(LOGITS), strict=True)
    return torch.cat([F.cross_entropy(model.head(h).float(), t, reduction="none") for h, t in parts]).double()


def batches(lengths: Integers, batch_tokens: int, model: RMKV) -> Iterator[Integers]:
    """Yield batches of indices of `lengths`, shortest documents first, each of at most `batch_tokens` a segment.

    For a model that is not causal, whose earlier tokens would see the padding, a batch's documents are equally long.
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
    """Raise `UserError` if documents have ids or positions that the model does not know."""
    config = model.config
    if vocab_size > config.vocab_size:
        raise UserError(f"the data has a vocabulary of {vocab_size} tokens, the model one of {config.vocab_size}")
    if config.position == "learned" and longest > config.max_position_embeddings:
        raise UserError(
            f"a document has {longest} tokens, but the model's learned positions end at "
            f"{config.max_position_embeddings} (max_position_embeddings)"
        )
