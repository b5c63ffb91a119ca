"""Noise: tokens with a known minimum loss."""

import numpy as np
import pytest

from rmkv_cli.data.noise import noise_document


@pytest.mark.parametrize("vocab", [2, 16, 300])
def test_every_target_is_uniform_over_the_vocabulary_whatever_came_before(vocab):
    documents = [noise_document(vocab, [0, number], 7, 2) for number in range(min(20_000, 200_000 // vocab))]
    assert all(document[0] == 2 for document in documents)
    targets = np.concatenate([np.append(document[1:], 2) for document in documents])
    places = np.searchsorted([2, *range(7, 6 + vocab)], targets)
    counts = np.bincount(places, minlength=vocab)
    assert len(counts) == vocab
    expected = len(targets) / vocab
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < vocab - 1 + 5 * np.sqrt(2 * vocab)
    pairs = np.bincount(places[:-1] * vocab + places[1:], minlength=vocab**2)
    expected = len(targets) / vocab**2
    assert ((pairs - expected) ** 2 / expected).sum() < vocab**2 + 5 * np.sqrt(2) * vocab


def test_the_seed_determines_the_document():
    def first(seed):
        return noise_document(1000, seed, 7, 2).tolist()

    assert first([3, 1]) == first([3, 1]) != first([3, 2])
