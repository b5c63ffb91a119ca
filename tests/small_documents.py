"""Small sets of documents for tests."""

import numpy as np

from rmkv_cli.data.documents import Documents
from rmkv_cli.data.shards import BatchBuilder

EOD = 2


def make_documents(texts, sources=None, sizes=None, vocab_size=13, answers=None):
    """Documents of these ids, each after an `EOD`; `sources` 0 is named "a", and so on; `sizes` are 3 bytes a token.

    `answers` are for each document the spans of its ids, `EOD` among them, that alone count; None: all do.
    """
    builder = BatchBuilder(vocab_size)
    sources = sources or [0] * len(texts)
    for i, (text, source) in enumerate(zip(texts, sources, strict=True)):
        asked = answers[i] if answers else None
        builder.add(source, np.array([EOD, *text]), sizes[i] if sizes else 3 * len(text), asked)
    names = [chr(ord("a") + i) for i in range(max(sources) + 1)]
    return Documents([builder.build()], names, EOD, vocab_size, "no tokenizer")


def random_documents(lengths, seed=0, vocab_size=13, **rest):
    """Documents of so many random tokens each, `EOD` included."""
    random = np.random.default_rng(seed)
    texts = [random.integers(3, vocab_size, length - 1).tolist() for length in lengths]
    return make_documents(texts, vocab_size=vocab_size, **rest)
