"""Record the log probabilities of a text's tokens."""

from dataclasses import dataclass
from typing import Any

from rmkv_cli.generation import StopReason, Text
from rmkv_cli.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """Log probability of a token, from the model's log-softmax before penalties, temperature and filters."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    """Likeliest tokens with their log probabilities, as many as the request asks for."""
    offset: int
    """Number of complete characters of the text before the token."""


@dataclass(frozen=True)
class Said:
    """What a step adds to an answer."""

    choice: int
    text: str
    score: Score | None
    stop_reason: StopReason | None


class Choice(Text):
    """One of the texts that answer a request."""

    def __init__(self, number: int, tokenizer: Tokenizer, *how: Any) -> None:
        """Begin a text as `Text` does; `number` is its index among the answers."""
        super().__init__(tokenizer, *how)
        self._number = number
        self._decoded, self._offset = tokenizer.stream(self.answer), 0

    def said(self, piece: str) -> Said:
        """Return what the step with this piece adds to the answer; a token that ends the text has no score."""
        score = None
        if self.scores is not None and self.stop_reason != "end":
            score = Score(self.ids[-1], self.logprobs[-1], self.likeliest, self._offset)
            self._offset += len(self._decoded.step(score.token))
        return Said(self._number, piece, score, self.stop_reason)
