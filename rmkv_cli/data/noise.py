"""Uniformly random tokens, on which no causal model gets below ln(vocab) nats."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def noise_document(vocab: int, seed: Sequence[int], first: int, opening: int) -> npt.NDArray[np.uint32]:
    """Return a document (length,) of a stream of independent uniform tokens that is cut at each end of document.

    The `vocab` tokens are the end-of-document token and the `vocab - 1` ids from `first` on, so that every target of
    a document, the end that follows it included, has entropy ln(vocab). It begins with the token `opening`.
    """
    generator = np.random.default_rng(seed)
    length = int(generator.geometric(1 / vocab))  # until the next end comes, 1 to `vocab` - 1 draws to one
    document = generator.integers(first, first - 1 + vocab, length, dtype=np.uint32)
    document[0] = opening
    return document
