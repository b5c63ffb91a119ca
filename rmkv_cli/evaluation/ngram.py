"""The baseline that a language model must beat: a byte n-gram with Witten-Bell smoothing."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from rmkv_cli.data.documents import Documents
from rmkv_cli.tokenizer import Tokenizer

START = 256  # stands before a text's first byte: context only, never predicted
BASE = 257
CHUNK = 1 << 22  # bytes counted at once; bounds memory to some hundred MB

Counts = NDArray[np.int64]


class NGram:
    """A byte model that interpolates contexts of `order`, order - 1, ..., 0 bytes and the uniform one.

    Witten-Bell, as in Chen & Goodman (1998), section 2.4: with c(h) the count of a context h, T(h) the number
    of distinct bytes seen after it, and h' the context without its oldest byte,

        p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)),   p(w | h) = p(w | h') where h is unseen.

    Each text stands by itself: the bytes before its first are start marks. The end of a text is not predicted,
    which favours this model a little over a language model that pays for its end-of-document tokens.
    """

    def __init__(self, texts: Iterable[bytes], order: int = 3) -> None:
        self.order = order
        self._grams = _count(texts, order)

    def bits_per_byte(self, texts: Iterable[bytes]) -> float | None:
        """Return the mean of -log2 p over all bytes of `texts`; None where they have none."""
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


def texts(documents: Documents, tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield each document's text in UTF-8, its `sizes` bytes: no special tokens, and nothing of noise and tasks."""
    known = [b"" if i in tokenizer.tokens else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    for i in range(len(documents)):
        yield b"".join(map(known.__getitem__, documents[i].tolist())) if documents.sizes[i] else b""


def _count(texts: Iterable[bytes], order: int) -> tuple[Counts, Counts]:
    """Return the sorted codes of all (order + 1)-grams, oldest byte highest, and how often each occurs."""
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
    """Return the distinct keys, sorted, and the sum of each one's counts."""
    distinct, place = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(place, counts, len(distinct)).astype(np.int64)


def _look_up(keys: Counts, known: Counts, values: Counts) -> Counts:
    """Return for each key its value, 0 where it is not known."""
    if not len(known):
        return np.zeros_like(keys)
    place = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)
