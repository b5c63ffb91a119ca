"""Choose the source of the next document, so that the sources' tokens keep the ratio of the weights."""

from typing import Any

from rmkv_cli.config import MixConfig, Phase


class Balance:
    """Number of tokens taken from each source, and the number that its share asks for.

    The next document comes from the source that is furthest behind relative to its share. With constant shares, that
    is the source with the fewest tokens per weight. So no source is ever ahead by more than its last document.
    """

    def __init__(self, mix: MixConfig) -> None:
        """Start without any tokens."""
        weights = {source.name: source.weight for source in mix.sources}
        phases = mix.phases or [Phase(share=1)]
        share = (mix.tokens or 1) / sum(phase.share for phase in phases)
        self._ratios = [_normalized(list((weights | phase.weights).values())) for phase in phases]
        self._moves = [phase.moves for phase in phases]
        self._ends = [share * sum(phase.share for phase in phases[: i + 1]) for i in range(len(phases))]
        self.tokens = [0] * len(weights)
        """Number of tokens taken from each source."""
        self._wanted = [0.0] * len(weights)
        self._dropped: list[int] = []

    def shares(self, total: float) -> list[float]:
        """Return each source's share of the next tokens after `total` tokens."""
        phase = next((i for i, end in enumerate(self._ends) if total < end), len(self._ends) - 1)
        ratios = self._ratios[phase]
        if self._moves[phase]:
            begin = self._ends[phase - 1] if phase else 0
            progress = (total - begin) / (self._ends[phase] - begin)
            ratios = [a + progress * (b - a) for a, b in zip(ratios, self._ratios[phase + 1], strict=True)]
        for later in (ratios, *self._ratios[phase + 1 :]):  # a phase ends when all its sources are dropped
            remaining = [0.0 if i in self._dropped else ratio for i, ratio in enumerate(later)]
            if any(remaining):
                return _normalized(remaining)
        return remaining

    def is_used(self, source: int) -> bool:
        """Return whether a source has a share in any phase and is not dropped."""
        return source not in self._dropped and any(ratios[source] for ratios in self._ratios)

    def next(self) -> int | None:
        """Return the index of the next document's source; None if all sources with a share now or later are dropped."""
        shares = self.shares(sum(self.tokens))
        ahead = [(self.tokens[i] - self._wanted[i]) / share for i, share in enumerate(shares) if share]
        candidates = [i for i, share in enumerate(shares) if share]
        return candidates[ahead.index(min(ahead))] if candidates else None

    def count(self, source: int, tokens: int) -> None:
        """Count a document of `tokens` tokens from a source."""
        shares = self.shares(sum(self.tokens) + tokens / 2)
        self._wanted = [wanted + tokens * share for wanted, share in zip(self._wanted, shares, strict=True)]
        self.tokens[source] += tokens

    def drop(self, source: int) -> None:
        """Remove a source; the others divide its share."""
        self._dropped.append(source)

    @property
    def wanted(self) -> list[float]:
        """Share of all tokens so far that each source should have."""
        return _normalized(self._wanted) if any(self._wanted) else self.shares(0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict` as plain values."""
        return {"tokens": list(self.tokens), "wanted": list(self._wanted), "dropped": list(self._dropped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.tokens, self._wanted = list(state["tokens"]), list(state["wanted"])
        self._dropped = list(state["dropped"])


def _normalized(numbers: list[float]) -> list[float]:
    total = sum(numbers)
    return [number / total for number in numbers] if total else numbers
