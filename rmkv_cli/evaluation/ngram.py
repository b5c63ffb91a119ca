"""Baseline that a language model must beat: a byte n-gram with Witten-Bell smoothing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.evaluation.measure import sample
from rmkv_cli.tokenizer import Tokenizer

START = 256  # precedes a text's first byte, as context only; never predicted
BASE = 257
CHUNK = 1 << 22  # bytes counted at once; bounds memory to some hundred MB
TRAINING_TOKENS = 1 << 22  # bounds the time to count the training text to seconds

Counts = NDArray[np.int64]


class NGram:
    """A byte model that interpolates contexts of `order`, order - 1, ..., 0 bytes and the uniform one.

    Witten-Bell, as in Chen & Goodman (1998), section 2.4: with c(h) the count of a context h, T(h) the number
    of distinct bytes seen after it, and h' the context without its oldest byte,

        p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)),   p(w | h) = p(w | h') where h is unseen.

    Texts are independent; start marks precede the first byte of each. The end of a text is not predicted, a slight
    advantage over a language model, which pays for its end-of-document tokens.
    """

    def __init__(self, texts: Iterable[bytes], order: int = 3) -> None:
        self.order = order
        self._grams = _count(texts, order)

    def bits_per_byte(self, texts: Iterable[bytes]) -> float | None:
        """Return the mean of -log2 p over all bytes of `texts`; None if there are none."""
        asked, times = _count(texts, self.order)
        if not len(asked):
            return None
        p = np.full(len(asked), 1 / 256)
        for length in range(self.order + 1):
            shorter = BASE ** (length + 1)
            grams, counts = _sum_by(self._grams[0] % shorter, self._grams[1])
            contexts, totals = _sum_by(grams // BASE, counts)
            distinct = _sum_by(grams // BASE, np.ones_like(counts))[1]
            gram = asked % shorter
            times_gram = _look_up(gram, grams, counts)
            times_context = _look_up(gram // BASE, contexts, totals)
            kinds = _look_up(gram // BASE, contexts, distinct)
            p = np.where(kinds > 0, (times_gram + kinds * p) / np.maximum(times_context + kinds, 1), p)
        return float(-(times @ np.log2(p)) / times.sum())


@dataclass(frozen=True)
class Baseline:
    """How well an n-gram predicts the held-out documents of a mix."""

    order: int
    bits_per_byte: float
    training_bytes: int
    """Bytes of training text that it counted."""


def measure_baseline(mix: Path, tokenizer: Tokenizer, max_tokens: int | None = None) -> Baseline | None:
    """Return the score of an n-gram of a prepared mix's training documents on its held-out ones.

    It counts a sample of TRAINING_TOKENS of the training documents. `max_tokens` samples the held-out documents as
    `measure` does. None if the mix has no training text or no held-out text, or if only answers count in it.
    """
    if not Manifest.load(mix).splits["train"].documents:
        return None
    training, held_out = Documents.open(mix, "train"), Documents.open(mix, "validation")
    if (held_out.counts != held_out.lengths).any():
        return None
    counted = list(texts(training, tokenizer, TRAINING_TOKENS))
    size = sum(map(len, counted))
    model = NGram(counted) if size else None
    bits = model.bits_per_byte(texts(held_out, tokenizer, max_tokens)) if model else None
    return Baseline(model.order, bits, size) if model and bits is not None else None


def texts(documents: Documents, tokenizer: Tokenizer, max_tokens: int | None = None) -> Iterator[bytes]:
    """Yield each document's text in UTF-8, its `sizes` bytes: no special tokens, and nothing of noise and tasks.

    With `max_tokens`, yield the texts of a sample of the documents (see `sample`).
    """
    known = [b"" if i in tokenizer.tokens else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    for i, length in zip(*sample(documents.lengths, documents.sources, max_tokens), strict=True):
        ids = documents.part(int(i), 0, int(length) + 1).tolist()
        yield b"".join(map(known.__getitem__, ids)) if documents.sizes[i] else b""


def _count(texts: Iterable[bytes], order: int) -> tuple[Counts, Counts]:
    """Return the sorted codes of all (order + 1)-grams, oldest byte highest, and the count of each."""
    codes = counts = np.zeros(0, np.int64)
    for chunk in _chunks(texts):
        lengths = [len(text) for text in chunk]
        places = np.arange(sum(lengths)) + order * np.repeat(np.arange(1, len(chunk) + 1), lengths)
        padded = np.full(sum(lengths) + order * len(chunk), START, np.int64)
        padded[places] = np.frombuffer(b"".join(chunk), np.uint8)
        grams = sum((padded[places - back] * BASE**back for back in range(order + 1)), np.zeros_like(places))
        new, times = np.unique(grams, return_counts=True)
        codes, counts = _sum_by(np.append(codes, new), np.append(counts, times))
    return codes, counts


def _chunks(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if size:
        yield chunk


def _sum_by(keys: Counts, counts: Counts) -> tuple[Counts, Counts]:
    """Return the distinct keys, sorted, and the sum of the counts of each."""
    distinct, place = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(place, counts, len(distinct)).astype(np.int64)


def _look_up(keys: Counts, known: Counts, values: Counts) -> Counts:
    """Return the value of each key, 0 for an unknown one."""
    if not len(known):
        return np.zeros_like(keys)
    place = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)
