"""Smoothing of a run's loss."""

from collections.abc import Sequence


def smooth(pairs: Sequence[tuple[float, float]], most: int = 100) -> list[tuple[float, float]]:
    """Return at most about `most` means of consecutive pairs, because the loss of a single step is noisy."""
    size = -(-len(pairs) // most)
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
