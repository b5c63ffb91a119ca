"""Uniformly random tokens, on which the loss of a causal model cannot fall below ln(vocab) nats."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def noise_document(vocab: int, seed: Sequence[int], first: int, opening: int) -> npt.NDArray[np.uint32]:
    """Return a document (length,) of independent uniform tokens, cut from their stream at each end-of-document token.

    The `vocab` tokens are the end-of-document token and the `vocab - 1` ids from `first` on. So every target of a
    document, including the end after its last token, has entropy ln(vocab). The document begins with the token
    `opening`.
    """
    generator = np.random.default_rng(seed)
    length = int(generator.geometric(1 / vocab))  # each draw is the end-of-document token with probability 1 / vocab
    document = generator.integers(first, first - 1 + vocab, length, dtype=np.uint32)
    document[0] = opening
    return document
