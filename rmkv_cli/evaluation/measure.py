"""Loss, perplexity and bits per byte on documents: overall, by source, and by position within the document."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.reading import Integers, batches, continuing, require_fits, steps, token_losses
from rmkv_cli.model import RMKV, inference
from rmkv_cli.tokenizer import Tokenizer

FIRST_BUCKET = 64  # positions 0 to 63; each further bucket ends at twice the position
LONG_DOCUMENTS = 32  # enough documents for losses within long ones; or a fifth of all, if that is fewer


@dataclass(frozen=True)
class Score:
    """Loss over documents, including their end-of-document tokens.

    The scored tokens are those that count in training; in documents with answers, only the answers.
    """

    documents: int
    tokens: int
    """Number of scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored tokens in documents that have a text and whose bytes are known."""
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """Bits per byte of `bytes`; None if it is 0."""


@dataclass(frozen=True)
class PositionLoss:
    """Loss over the tokens at positions `first` to `last` of their documents, counted from 0.

    A report leaves out positions at which no token is scored.
    """

    first: int
    last: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class LongDocuments:
    """The loss by position within long documents: every bucket covers the same ones, so buckets can be compared.

    Over all documents they cannot, because short documents end before the later positions.
    """

    documents: int
    min_tokens: int
    """Length that each of the documents reaches, and number of positions covered."""
    by_position: list[PositionLoss]


@dataclass(frozen=True)
class Report(Score):
    """Score over all documents, and its parts."""

    by_source: dict[str, Score]
    by_position: list[PositionLoss]
    cut: int
    """Number of documents that `max_tokens` cut short."""
    available_documents: int
    available_tokens: int | None
    """Value of `tokens` if all documents were read whole; None if the length of some is unknown."""
    long_documents: LongDocuments | None = field(default=None, kw_only=True)
    """None if too few documents reach 128 tokens, or an earlier version measured it."""


@dataclass(frozen=True)
class Losses:
    """Sums of the losses, in nats, of the documents read or of a part of them."""

    chosen: Integers
    """Index of each document (documents,)."""
    lengths: Integers
    """Number of tokens to read of each document (documents,)."""
    scored: Integers
    """Number of scored tokens of each document (documents,)."""
    edges: Integers
    """First position of each bucket (buckets,)."""
    by_document: Tensor
    """Loss of each document (documents,)."""
    by_bucket: Tensor
    """Loss in each bucket (2, buckets): of all documents, and of long ones (see `long_length`)."""
    counts: Tensor
    """Number of tokens scored in each bucket (2, buckets)."""


def measure(
    model: RMKV,
    documents: Documents,
    *,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    batch_tokens: int = 8192,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Report:
    """Measure how well the model predicts the documents, each read alone and from its start.

    Args:
        model: the model; its training mode is restored.
        documents: documents to read.
        max_tokens: maximum number of tokens to read (see `sample`).
        tokenizer: counts the bytes of documents that are scored only in part; without it, bits per byte leaves such
            documents out.
        batch_tokens: maximum number of tokens in one forward pass; bounds the memory.
        advance: progress callback, called with the number of tokens just read.

    Raises:
        UserError: there are no documents, they do not fit the model, or the part that is read contains no answer.
    """
    losses = read_losses(model, documents, max_tokens=max_tokens, batch_tokens=batch_tokens, advance=advance)
    return report_on(documents, losses, tokenizer)


def read_losses(
    model: RMKV,
    documents: Documents,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = 8192,
    advance: Callable[[float], None] = lambda tokens: None,
    part: int = 0,
    parts: int = 1,
) -> Losses:
    """Return the losses that `measure` reports; arguments and errors are the same.

    With `parts`, read only every `parts`-th document in the order of their lengths, starting with number `part`. The
    losses of all parts add up to those of all documents.
    """
    chosen, lengths = sample(documents.lengths, documents.sources, max_tokens)
    require_fits(model, documents.vocab_size, int(lengths.max()))
    edges = bucket_edges(int(lengths.max()))
    device = model.memory.device
    scored = _scored(documents, chosen, lengths)
    if not documents.counts.any():
        raise UserError("no token of these documents is supervised, so there is no loss to measure")
    if not scored.any():
        raise UserError(f"max_tokens = {max_tokens} ends before the first answer; raise it")
    by_document = torch.zeros(len(chosen), dtype=torch.float64, device=device)
    by_bucket = torch.zeros(2, len(edges), dtype=torch.float64, device=device)
    counts = np.zeros((2, len(edges)), np.int64)
    long = long_length(lengths)
    mine = np.argsort(lengths, kind="stable")[part::parts]
    with inference(model):
        for batch in (mine[indices] for indices in batches(lengths[mine], batch_tokens, model)):
            state = model.initial_state(len(batch))
            texts = [documents.part(int(chosen[i]), 0, int(lengths[i]) + 1) for i in batch]
            counted = [documents.counted(int(i)) for i in chosen[batch]]
            for step in steps(texts, lengths[batch], documents.eod, model, counted):
                hidden, state = model.hidden(step.inputs, continuing(state, step))
                losses = token_losses(model, hidden, step)
                buckets = np.searchsorted(edges, step.start + step.columns, side="right") - 1
                of_target = batch[-len(step.inputs) :][step.rows]
                in_long = (lengths[of_target] >= long) & (step.start + step.columns < long)
                by_document.index_add_(0, torch.from_numpy(of_target).to(device), losses)
                both = torch.stack([losses, losses * torch.from_numpy(in_long).to(device)])
                by_bucket.index_add_(1, torch.from_numpy(buckets).to(device), both)
                counts += [np.bincount(x, minlength=len(edges)) for x in (buckets, buckets[in_long])]
                advance(step.read)
    return Losses(chosen, lengths, scored, edges, by_document, by_bucket, torch.from_numpy(counts).to(device))


def report_on(documents: Documents, losses: Losses, tokenizer: Tokenizer | None = None) -> Report:
    """Return the report on the sums of the losses of all parts; the other arguments are those of `measure`."""
    chosen, lengths, scored, edges = losses.chosen, losses.lengths, losses.scored, losses.edges
    nats = losses.by_document.cpu().numpy()
    sizes = _sizes(documents, chosen, lengths, tokenizer)
    sources = documents.sources[chosen]
    present = [(name, sources == i) for i, name in enumerate(documents.source_names) if scored[sources == i].any()]
    lasts = [*(edges[1:] - 1), lengths.max() - 1]
    by_position, in_long = (
        [
            PositionLoss(int(first), int(last), int(n), float(total / n))
            for first, last, n, total in zip(edges, lasts, numbers, totals, strict=True)
            if n
        ]
        for numbers, totals in zip(losses.counts.tolist(), losses.by_bucket.tolist(), strict=True)
    )
    long = long_length(lengths)
    return Report(
        **_score(nats, scored, sizes),
        by_source={name: Score(**_score(nats[of], scored[of], sizes[of])) for name, of in present},
        by_position=by_position,
        cut=int((lengths < documents.lengths[chosen]).sum()),
        available_documents=len(documents),
        available_tokens=int(documents.counts.sum()) if documents.complete else None,
        long_documents=LongDocuments(int((lengths >= long).sum()), long, in_long) if in_long else None,
    )


def choose(lengths: Integers, max_tokens: int | None) -> tuple[Integers, Integers]:
    """Return the documents to read and the number of tokens of each: whole ones in a fixed random order.

    The document that would exceed `max_tokens` is cut there.

    Raises:
        UserError: there are no documents, or `max_tokens` is not positive.
    """
    if not len(lengths):
        raise UserError("there are no documents to evaluate on")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens: should be 1 or more, got {max_tokens}")
    if max_tokens is None or lengths.sum() <= max_tokens:
        return np.arange(len(lengths)), lengths.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]
    order = order[before < max_tokens]
    return order, np.minimum(lengths[order], max_tokens - before[before < max_tokens])


def sample(lengths: Integers, sources: Integers, max_tokens: int | None) -> tuple[Integers, Integers]:
    """Return a representative sample of documents and the number of tokens to read of each; it is always the same.

    Documents of one source with lengths within a factor of two form a stratum. A stratum's share of `max_tokens` is its
    share of all tokens, so sources and lengths keep their proportions. It gives whole documents in a fixed random
    order and cuts the last one. Arguments, result and errors are as in `choose`; in addition, `sources` (documents,)
    has the index of each document's source.
    """
    if max_tokens is None or not 1 <= max_tokens < lengths.sum():
        return choose(lengths, max_tokens)
    keys = np.stack([sources, np.log2(lengths).astype(np.int64)], axis=1)
    strata = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    shares = np.cumsum(np.bincount(strata, lengths)) / lengths.sum()
    budgets = np.diff(np.round(shares * max_tokens).astype(np.int64), prepend=0)
    drawn = [(np.flatnonzero(strata == i), int(budget)) for i, budget in enumerate(budgets) if budget]
    parts = [(of, *choose(lengths[of], budget)) for of, budget in drawn]
    return np.concatenate([of[order] for of, order, _ in parts]), np.concatenate([read for *_, read in parts])


def scored_tokens(documents: Documents, max_tokens: int | None) -> int:
    """Return the number of scored tokens in a sample of `max_tokens` of the documents; errors as in `choose`."""
    chosen, lengths = sample(documents.lengths, documents.sources, max_tokens)
    return int(_scored(documents, chosen, lengths).sum())


def token_sizes(tokenizer: Tokenizer) -> Integers:
    """Return the number of bytes of text of each token, (V,); special tokens have none."""
    sizes = range(tokenizer.vocab_size)
    return np.array([0 if i in tokenizer.tokens else len(tokenizer.token_bytes(i)) for i in sizes])


def _scored(documents: Documents, chosen: Integers, lengths: Integers) -> Integers:
    """Return the number of scored tokens in the part that is read of each document."""
    scored = documents.counts[chosen]
    for i in np.flatnonzero(lengths < documents.lengths[chosen]):
        counted = documents.counted(int(chosen[i]))
        scored[i] = lengths[i] if counted is None else counted[: lengths[i]].sum()
    return scored


def _sizes(documents: Documents, chosen: Integers, lengths: Integers, tokenizer: Tokenizer | None) -> Integers:
    """Return the bytes of the scored tokens of each document; 0 if they are not known."""
    sizes = documents.sizes[chosen].astype(np.int64)
    of_token = token_sizes(tokenizer) if tokenizer else None
    in_part = (lengths < documents.lengths[chosen]) | (documents.counts[chosen] < documents.lengths[chosen])
    begins = tokenizer is None or tokenizer.roles.begin is not None
    in_part |= not begins  # nothing predicts the first token
    spaced = tokenizer is not None and tokenizer.foreign is not None and tokenizer.foreign.spaced[0]
    for i in np.flatnonzero(in_part & (sizes > 0)):
        if of_token is None:
            sizes[i] = 0
            continue
        index, length = int(chosen[i]), int(lengths[i])
        of_targets = of_token[documents.part(index, 1, length + 1)]
        of_targets[:1] -= spaced and begins  # the space that the tokenizer prepends to the text
        counted = documents.counted(index)
        sizes[i] = (of_targets if counted is None else of_targets[counted[: len(of_targets)]]).sum()
    return sizes


def _score(nats: NDArray[np.float64], scored: Integers, sizes: Integers) -> dict[str, Any]:
    """Return the fields of a `Score` over documents with these losses in nats, tokens and bytes."""
    tokens, size = int(scored.sum()), int(sizes.sum())
    loss = float(nats.sum()) / tokens
    return {
        "documents": len(nats),
        "tokens": tokens,
        "bytes": size,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # larger values overflow
        "bits_per_byte": float(nats[sizes > 0].sum()) / math.log(2) / size if size else None,
    }


def bucket_edges(longest: int) -> Integers:
    """Return the first position of each bucket: 0, 64, 128, 256, and so on below `longest`."""
    edges = [0]
    while (edge := max(FIRST_BUCKET, 2 * edges[-1])) < longest:
        edges.append(edge)
    return np.array(edges)


def long_length(lengths: Integers) -> int:
    """Return the length from which documents count as long, a multiple of a bucket; 0 if too few reach two buckets.

    It is the end of the last bucket that LONG_DOCUMENTS of them cover; a fifth of them if that is fewer, at least two.
    """
    enough = max(2, min(LONG_DOCUMENTS, len(lengths) // 5))
    reached = int(np.sort(lengths)[-enough]) if len(lengths) >= enough else 0
    return FIRST_BUCKET << (reached // FIRST_BUCKET).bit_length() - 1 if reached >= 2 * FIRST_BUCKET else 0
