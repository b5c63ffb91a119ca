"""Comparison of an RMKV with a transformers causal model on the same texts, each with its own tokenizer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.measure import LongDocuments, PositionLoss, Report, bucket_edges, long_length, measure, sample
from rmkv_cli.model import RMKV
from rmkv_cli.model.size import state_bytes
from rmkv_cli.tokenizer import Token, Tokenizer

CHUNK = 512  # tokens that the transformer reads at once; earlier ones are in the cache


@dataclass(frozen=True)
class Reading:
    """Cost of reading the texts one at a time."""

    parameters: int
    tokens_per_second: float
    carried_bytes: int
    """Maximum bytes of the state, or bytes of the cache after the longest text."""
    carried_tokens: int
    """Number of tokens in the longest text."""


@dataclass(frozen=True)
class Beside:
    """Losses of a transformers model, and the reading cost of both models."""

    name: str
    documents: int
    tokens: int
    """Number of predicted tokens: all of a text that have a predecessor, and its end."""
    bytes: int
    """UTF-8 bytes of those tokens."""
    loss: float
    """Nats per token, in tokens of its own tokenizer."""
    bits_per_byte: float
    by_position: list[PositionLoss]
    cut: int
    """Number of texts longer than the model's maximum length; only their beginnings are read."""
    reading: Reading
    """Cost of the transformers model."""
    own: Reading
    """Cost of the RMKV."""
    long_documents: LongDocuments | None = None


def measure_beside(
    rmkv: tuple[RMKV, Tokenizer],
    transformer: tuple[Any, Any],
    name: str,
    documents: Documents,
    *,
    max_tokens: int | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> tuple[Report, Beside]:
    """Measure how well an RMKV and a transformers model predict the documents; both read one document at a time.

    Args:
        rmkv: the RMKV and its tokenizer.
        transformer: a transformers causal model and its tokenizer.
        name: name of the transformer.
        documents: documents to read.
        max_tokens: maximum number of the RMKV's tokens to read (see `sample`); the transformer reads the same texts.
        advance: progress callback, called with the number of the RMKV's tokens that either model has just read.

    Raises:
        UserError: as in `measure`; or only the answers count in some documents.
    """
    if (documents.counts != documents.lengths).any():
        raise UserError("--beside compares models on whole texts, but only the answers count in these documents")
    model, tokenizer = rmkv
    begun = perf_counter()
    report = measure(
        model, documents, max_tokens=max_tokens, tokenizer=tokenizer, batch_tokens=1, advance=lambda n: advance(n / 2)
    )
    seconds = perf_counter() - begun
    chosen, lengths = sample(documents.lengths, documents.sources, max_tokens)
    element = model.dtype.itemsize
    largest = state_bytes(model.config, max(4, element), element)[1]
    reading = Reading(model.count_parameters(), report.tokens / seconds, largest, int(lengths.max()))
    reader = _Reader(*transformer)
    for index, length in zip(chosen, lengths, strict=True):
        pieces = tokenizer.pieces(documents.part(int(index), 0, int(length) + 1).tolist())
        text = "".join(piece for piece in pieces if not isinstance(piece, Token))
        reader.read(text, whole=bool(length == documents.lengths[index]))
        advance(int(length) / 2)
    return report, reader.result(name, reading)


class _Reader:
    """Reader of texts with a transformers model, which collects its losses."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._most = getattr(self._model.config.get_text_config(), "max_position_embeddings", math.inf)
        self._nats: list[Tensor] = []
        self._bytes = self._cut = 0
        self._seconds = 0.0
        self._longest = (0, 0)

    def read(self, text: str, whole: bool) -> None:
        """Read a text; if it is whole, predict its end as well."""
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if len(ids) > self._most:
            self._cut += 1
            ids, whole = ids[: self._most], False
        targets = ids[1:] + [self._tokenizer.eos_token_id] * (whole and self._tokenizer.eos_token_id is not None)
        if not targets:
            return
        # Nothing predicts the first token, unless the tokenizer prepends one to the text.
        self._bytes += len(text[offsets[0][1] : offsets[len(ids) - 1][1]].encode())
        begun = perf_counter()
        self._nats.append(torch.cat([*self._losses(ids[: len(targets)], targets)]).cpu())
        self._seconds += perf_counter() - begun

    def _losses(self, ids: list[int], targets: list[int]) -> Iterator[Tensor]:
        """Yield the losses of the targets in nats, CHUNK at a time."""
        cache: Any = None
        device = self._model.device
        for start in range(0, len(ids), CHUNK):
            part, wanted = (torch.tensor(x[start : start + CHUNK], device=device) for x in (ids, targets))
            with torch.inference_mode():
                read = self._model(input_ids=part[None], past_key_values=cache, use_cache=True)
            cache = read.past_key_values
            yield F.cross_entropy(read.logits[0].float(), wanted, reduction="none").double()
        self._longest = max(self._longest, (len(ids), _size(cache)))

    def result(self, name: str, own: Reading) -> Beside:
        """Return the figures of all texts read."""
        if not self._nats:
            raise UserError(f"{name}: its tokenizer encodes each of these texts to at most one token; use longer texts")
        long = long_length(np.array([len(nats) for nats in self._nats]))
        in_long = [nats[:long] for nats in self._nats if len(nats) >= long]
        nats = torch.cat(self._nats)
        loss = nats.mean().item()
        length, size = self._longest
        return Beside(
            name=name,
            documents=len(self._nats),
            tokens=len(nats),
            bytes=self._bytes,
            loss=loss,
            bits_per_byte=nats.sum().item() / math.log(2) / self._bytes,
            by_position=_by_position(self._nats),
            cut=self._cut,
            reading=Reading(self._model.num_parameters(), len(nats) / self._seconds, size, length),
            own=own,
            long_documents=LongDocuments(len(in_long), long, _by_position(in_long)) if long else None,
        )


def _by_position(documents: list[Tensor]) -> list[PositionLoss]:
    """Return the mean loss in each bucket of positions, given each document's losses."""
    longest = max(map(len, documents))
    edges = bucket_edges(longest)
    parts = []
    for first, last in zip(edges.tolist(), [*(edges[1:] - 1).tolist(), longest - 1], strict=True):
        nats = torch.cat([losses[first : last + 1] for losses in documents])
        parts.append(PositionLoss(first, last, len(nats), nats.mean().item()))
    return parts


def _size(cache: Any) -> int:
    """Return the bytes of a cache's tensors."""
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor))
