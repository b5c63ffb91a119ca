"""Loss, perplexity and bits per byte on documents: overall, by source, and by position within the document."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.reading import Integers, batches, going_on, require_fits, steps, token_losses
from rmkv_cli.model import RMKV, inference
from rmkv_cli.tokenizer import Tokenizer

FIRST_BUCKET = 64  # positions 0 to 63; each further bucket ends at twice the position


@dataclass(frozen=True)
class Score:
    """The loss over some documents, their end-of-document tokens included.

    It is about the tokens that count in training: of documents with answers, those of the answers alone.
    """

    documents: int
    tokens: int
    """Those that the loss is about."""
    bytes: int
    """UTF-8 bytes that bits_per_byte is about: those of the tokens that the loss is about, of documents that have a
    text, and whose bytes are known."""
    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float | None
    """None where there are no bytes."""


@dataclass(frozen=True)
class PositionLoss:
    """The loss over the tokens at positions `first` to `last` of their documents; the first token's is 0.

    Positions at which no token counts are left out of a report.
    """

    first: int
    last: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Report(Score):
    """A `Score` over all documents, and its parts."""

    by_source: dict[str, Score]
    by_position: list[PositionLoss]
    cut: int
    """Number of documents of which `max_tokens` allowed only the beginning."""
    available_documents: int
    available_tokens: int | None
    """Value of `tokens` if all documents were read whole; None if the length of some is unknown."""


@dataclass(frozen=True)
class Losses:
    """The losses in nats of the documents that were read, or of a part of them, added up."""

    chosen: Integers
    """Index of each document (documents,), of which `scored` and `by_document` tell."""
    lengths: Integers
    """Tokens to read of each."""
    scored: Integers
    """Tokens of each that the loss is about."""
    edges: Integers
    """First position of each bucket (buckets,), of which `by_bucket` and `counts` tell."""
    by_document: Tensor
    by_bucket: Tensor
    counts: Tensor
    """Tokens."""


def measure(
    model: RMKV,
    documents: Documents,
    *,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    batch_tokens: int = 8192,
    advance: Callable[[float], None] = lambda tokens: None,
) -> Report:
    """Return how well the model predicts the documents, each read alone and from its start.

    Args:
        model: its training mode is restored.
        documents: what is read.
        max_tokens: most tokens to read (see `sample`).
        tokenizer: gives the bytes of what is scored of a document, where that is not all of it; without it, bits per
            byte leaves such documents out.
        batch_tokens: most tokens in one forward pass; bounds the memory.
        advance: is called with the number of tokens just read.

    Raises:
        UserError: there are no documents, they do not fit the model, or what is read of them holds no answer.
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

    With `parts`, read only every `parts`-th document in the order of their lengths, from number `part` on. Added up
    over all parts, the losses are those of all documents.
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
    by_bucket = torch.zeros(len(edges), dtype=torch.float64, device=device)
    counts = np.zeros(len(edges), np.int64)
    own = np.argsort(lengths, kind="stable")[part::parts]
    with inference(model):
        for batch in (own[indices] for indices in batches(lengths[own], batch_tokens, model)):
            state = model.initial_state(len(batch))
            texts = [documents.part(int(chosen[i]), 0, int(lengths[i]) + 1) for i in batch]
            counted = [documents.counted(int(i)) for i in chosen[batch]]
            for step in steps(texts, lengths[batch], documents.eod, model, counted):
                hidden, state = model.hidden(step.inputs, going_on(state, step))
                losses = token_losses(model, hidden, step)
                buckets = np.searchsorted(edges, step.start + step.columns, side="right") - 1
                by_document.index_add_(0, torch.from_numpy(batch[-len(step.inputs) :][step.rows]).to(device), losses)
                by_bucket.index_add_(0, torch.from_numpy(buckets).to(device), losses)
                counts += np.bincount(buckets, minlength=len(edges))
                advance(step.read)
    return Losses(chosen, lengths, scored, edges, by_document, by_bucket, torch.from_numpy(counts).to(device))


def report_on(documents: Documents, losses: Losses, tokenizer: Tokenizer | None = None) -> Report:
    """Return what the losses of all parts, added up, say; the other arguments are `measure`'s."""
    chosen, lengths, scored, edges = losses.chosen, losses.lengths, losses.scored, losses.edges
    nats = losses.by_document.cpu().numpy()
    sizes = _sizes(documents, chosen, lengths, tokenizer)
    sources = documents.sources[chosen]
    present = [(name, sources == i) for i, name in enumerate(documents.source_names) if scored[sources == i].any()]
    lasts = [*(edges[1:] - 1), lengths.max() - 1]
    return Report(
        **_score(nats, scored, sizes),
        by_source={name: Score(**_score(nats[of], scored[of], sizes[of])) for name, of in present},
        by_position=[
            PositionLoss(int(first), int(last), int(n), float(total / n))
            for first, last, n, total in zip(
                edges, lasts, losses.counts.tolist(), losses.by_bucket.cpu().numpy(), strict=True
            )
            if n
        ],
        cut=int((lengths < documents.lengths[chosen]).sum()),
        available_documents=len(documents),
        available_tokens=int(documents.counts.sum()) if documents.complete else None,
    )


def choose(lengths: Integers, max_tokens: int | None) -> tuple[Integers, Integers]:
    """Return the documents to read, and how many tokens of each: whole ones in a fixed random order up to the budget.

    The one that would pass `max_tokens` is read up to it. Raises `UserError` if there are no documents, or
    none may be read.
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
    """Return how many tokens a loss over at most `max_tokens` of the documents is about; errors as in `choose`."""
    chosen, lengths = sample(documents.lengths, documents.sources, max_tokens)
    return int(_scored(documents, chosen, lengths).sum())


def token_sizes(tokenizer: Tokenizer) -> Integers:
    """Return how many bytes of text each token is, (V,); special tokens are none."""
    sizes = range(tokenizer.vocab_size)
    return np.array([0 if i in tokenizer.tokens else len(tokenizer.token_bytes(i)) for i in sizes])


def _scored(documents: Documents, chosen: Integers, lengths: Integers) -> Integers:
    """Return how many targets count in what is read of each document."""
    scored = documents.counts[chosen]
    for i in np.flatnonzero(lengths < documents.lengths[chosen]):
        counted = documents.counted(int(chosen[i]))
        scored[i] = lengths[i] if counted is None else counted[: lengths[i]].sum()
    return scored


def _sizes(documents: Documents, chosen: Integers, lengths: Integers, tokenizer: Tokenizer | None) -> Integers:
    """Return the bytes of what is scored of each document; 0 where they are not known."""
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
        "perplexity": math.exp(min(loss, 700.0)),  # beyond it would overflow
        "bits_per_byte": float(nats[sizes > 0].sum()) / math.log(2) / size if size else None,
    }


def bucket_edges(longest: int) -> Integers:
    """Return the first position of each bucket: 0, 64, 128, 256, and so on below `longest`."""
    edges = [0]
    while (edge := max(FIRST_BUCKET, 2 * edges[-1])) < longest:
        edges.append(edge)
    return np.array(edges)
