"""Which source the next document comes from, so that tokens keep the wanted ratio."""

from typing import Any

from rmkv_cli.config import MixConfig, Phase


class Balance:
    """How many tokens each source has given, and how many it should have by now.

    The next document is the source's that is furthest behind for its share: with constant shares, the one that has
    given the fewest tokens for its weight. So no source is ever ahead by more than its last document.
    """

    def __init__(self, mix: MixConfig) -> None:
        """Begin with no tokens given."""
        own = {source.name: source.weight for source in mix.sources}
        phases = mix.phases or [Phase(share=1)]
        share = (mix.tokens or 1) / sum(phase.share for phase in phases)
        self._ratios = [_normed(list((own | phase.weights).values())) for phase in phases]
        self._moves = [phase.moves for phase in phases]
        self._ends = [share * sum(phase.share for phase in phases[: i + 1]) for i in range(len(phases))]
        self.tokens = [0] * len(own)
        """That each source has given."""
        self._wanted = [0.0] * len(own)
        self._dropped: list[int] = []

    def shares(self, total: float) -> list[float]:
        """Return each source's share of the tokens where `total` have been given."""
        phase = next((i for i, end in enumerate(self._ends) if total < end), len(self._ends) - 1)
        ratios = self._ratios[phase]
        if self._moves[phase]:
            begin = self._ends[phase - 1] if phase else 0
            way = (total - begin) / (self._ends[phase] - begin)
            ratios = [a + way * (b - a) for a, b in zip(ratios, self._ratios[phase + 1], strict=True)]
        for later in (ratios, *self._ratios[phase + 1 :]):  # a phase whose sources are all dry is over
            left = [0.0 if i in self._dropped else ratio for i, ratio in enumerate(later)]
            if any(left):
                return _normed(left)
        return left

    def may_give(self, source: int) -> bool:
        """Return whether a source has a share in any phase and is not dropped."""
        return source not in self._dropped and any(ratios[source] for ratios in self._ratios)

    def next(self) -> int | None:
        """Return the index of the source whose turn it is; None if all that have a share now or later are dropped."""
        shares = self.shares(sum(self.tokens))
        behind = [(self.tokens[i] - self._wanted[i]) / share for i, share in enumerate(shares) if share]
        turns = [i for i, share in enumerate(shares) if share]
        return turns[behind.index(min(behind))] if turns else None

    def count(self, source: int, tokens: int) -> None:
        """Take note of a source's document."""
        shares = self.shares(sum(self.tokens) + tokens / 2)
        self._wanted = [wanted + tokens * share for wanted, share in zip(self._wanted, shares, strict=True)]
        self.tokens[source] += tokens

    def drop(self, source: int) -> None:
        """Leave a source's share to the others."""
        self._dropped.append(source)

    @property
    def wanted(self) -> list[float]:
        """Share of the tokens so far that each source should have given."""
        return _normed(self._wanted) if any(self._wanted) else self.shares(0)

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain values, all that `load_state_dict` needs."""
        return {"tokens": list(self.tokens), "wanted": list(self._wanted), "dropped": list(self._dropped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.tokens, self._wanted = list(state["tokens"]), list(state["wanted"])
        self._dropped = list(state["dropped"])


def _normed(numbers: list[float]) -> list[float]:
    whole = sum(numbers)
    return [number / whole for number in numbers] if whole else numbers
