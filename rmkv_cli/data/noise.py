"""Uniformly random tokens, on which no causal model gets below ln(vocab) nats."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from rmkv_cli.tokenizer import Special

DRAWS = 65_536


def noise_documents(vocab: int, seed: int | Sequence[int]) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield documents (length,) of an endless stream of independent uniform tokens, cut at each end of document.

    The `vocab` tokens are the end-of-document token and the `vocab - 1` ids right after the special tokens, so that
    every target of a document, the end that follows it included, has entropy ln(vocab). As all documents, each
    begins with the end-of-document token.
    """
    generator = np.random.default_rng(seed)
    ids = np.arange(len(Special) - 1, len(Special) - 1 + vocab, dtype=np.uint32)
    ids[0] = Special.EOD.id
    stream = ids[:1]
    while True:
        stream = np.concatenate([stream, ids[generator.integers(vocab, size=DRAWS)]])
        *documents, stream = np.split(stream, np.flatnonzero(stream == Special.EOD.id)[1:])
        yield from documents
