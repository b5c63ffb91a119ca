"""A causal model of transformers beside an RMKV: the same texts, each model with its own tokenizer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.measure import PositionLoss, Report, bucket_edges, measure, sample
from rmkv_cli.model import RMKV
from rmkv_cli.model.size import state_bytes
from rmkv_cli.tokenizer import Token, Tokenizer

CHUNK = 512  # tokens that are read at once; what came before them is in the cache


@dataclass(frozen=True)
class Reading:
    """What it takes to read the texts, one at a time."""

    parameters: int
    tokens_per_second: float
    carried_bytes: int
    """Those of the state, at most; or of the cache after the longest text."""
    carried_tokens: int
    """Tokens of that text."""


@dataclass(frozen=True)
class Beside:
    """The losses of a model of transformers, and what both models' reading takes."""

    name: str
    documents: int
    tokens: int
    """Those that the loss is about: all of a text that have one before them, and its end."""
    bytes: int
    """UTF-8 bytes of those tokens."""
    loss: float
    """Nats per token of its own."""
    bits_per_byte: float
    by_position: list[PositionLoss]
    cut: int
    """Number of texts that are longer than the model was made for. What is beyond that is not read."""
    reading: Reading
    own: Reading
    """That of the RMKV."""


def measure_beside(
    own: tuple[RMKV, Tokenizer],
    other: tuple[Any, Any],
    name: str,
    documents: Documents,
    *,
    max_tokens: int | None = None,
    advance: Callable[[float], None] = lambda tokens: None,
) -> tuple[Report, Beside]:
    """Return how well an RMKV and a model of transformers predict the documents, which both read one at a time.

    Args:
        own: the RMKV and its tokenizer.
        other: a causal model of transformers and its tokenizer.
        name: of the other model.
        documents: what is read.
        max_tokens: most tokens of the RMKV's to read (see `sample`); the other model reads the same texts.
        advance: is called with the number of the RMKV's tokens just read, by either model.

    Raises:
        UserError: as in `measure`; or of some documents only the answers count, which are no texts.
    """
    if (documents.counts != documents.lengths).any():
        raise UserError("--beside compares models on texts, but of these documents only the answers count")
    model, tokenizer = own
    begun = perf_counter()
    report = measure(
        model, documents, max_tokens=max_tokens, tokenizer=tokenizer, batch_tokens=1, advance=lambda n: advance(n / 2)
    )
    seconds = perf_counter() - begun
    chosen, lengths = sample(documents.lengths, documents.sources, max_tokens)
    weights = model.embedding.weight
    largest = state_bytes(model.config, max(4, weights.element_size()), weights.element_size())[1]
    reading = Reading(model.count_parameters(), report.tokens / seconds, largest, int(lengths.max()))
    reader = _Reader(*other)
    for index, length in zip(chosen, lengths, strict=True):
        pieces = tokenizer.pieces(documents.part(int(index), 0, int(length) + 1).tolist())
        text = "".join(piece for piece in pieces if not isinstance(piece, Token))
        reader.read(text, whole=bool(length == documents.lengths[index]))
        advance(int(length) / 2)
    return report, reader.result(name, reading)


class _Reader:
    """Reads texts by a model of transformers, and adds up its losses."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._most = getattr(self._model.config.get_text_config(), "max_position_embeddings", math.inf)
        self._nats: list[Tensor] = []
        self._bytes = self._cut = 0
        self._seconds = 0.0
        self._longest = (0, 0)

    def read(self, text: str, whole: bool) -> None:
        """Read a text, and predict its end as well if it is whole."""
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if len(ids) > self._most:
            self._cut += 1
            ids, whole = ids[: self._most], False
        targets = ids[1:] + [self._tokenizer.eos_token_id] * (whole and self._tokenizer.eos_token_id is not None)
        if not targets:
            return
        # The first token is predicted by none, unless it is one that the tokenizer puts before the text.
        self._bytes += len(text[offsets[0][1] : offsets[len(ids) - 1][1]].encode())
        begun = perf_counter()
        self._nats.append(torch.cat([*self._losses(ids[: len(targets)], targets)]).cpu())
        self._seconds += perf_counter() - begun

    def _losses(self, ids: list[int], targets: list[int]) -> Iterator[Tensor]:
        """Yield the losses of targets in nats, of CHUNK of them at a time."""
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
        """Return what was found."""
        if not self._nats:
            raise UserError(f"{name}: its tokenizer makes no more than a token of any of these texts")
        longest = max(map(len, self._nats))
        edges = bucket_edges(longest)
        buckets = [
            (int(first), int(last), torch.cat([nats[first : last + 1] for nats in self._nats]))
            for first, last in zip(edges, [*(edges[1:] - 1), longest - 1], strict=True)
        ]
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
            by_position=[PositionLoss(first, last, len(x), x.mean().item()) for first, last, x in buckets if len(x)],
            cut=self._cut,
            reading=Reading(self._model.num_parameters(), len(nats) / self._seconds, size, length),
            own=own,
        )


def _size(cache: Any) -> int:
    """Return the bytes of a cache's tensors."""
    return sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor))
