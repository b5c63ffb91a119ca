"""A text that notes how likely its tokens were."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmkv_cli.generation import StopReason, Text
from rmkv_cli.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """How likely a token was, by the model's log-softmax, before all that sampling does to it."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, as many as were asked for."""
    offset: int
    """Characters of the text that were whole before it."""


@dataclass(frozen=True)
class Said:
    """What a step adds to an answer."""

    choice: int
    text: str
    score: Score | None
    stop_reason: StopReason | None


class Choice(Text):
    """One of the texts that answer a request."""

    def __init__(self, number: int, scores: int | None, tokenizer: Tokenizer, *how: Any) -> None:
        """Begin a text as `Text` does; `scores`: how many of the likeliest tokens go with each, None: no score."""
        super().__init__(tokenizer, *how)
        self._number, self._scores, self._vocabulary = number, scores, tokenizer.vocab_size
        self._score: Score | None = None
        self._decoded, self._offset = tokenizer.stream(), 0

    def draw(self, logits: Tensor) -> Tensor:
        """Return the next token as `Text` does, and note its score."""
        token = super().draw(logits)
        if self._scores is not None:
            logprobs = logits[0].log_softmax(-1)
            values, ids = logprobs[: self._vocabulary].topk(min(self._scores, self._vocabulary))
            likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            self._score = Score(int(token), float(logprobs[token]), likeliest, self._offset)
        return token

    def said(self, piece: str) -> Said:
        """Return what the step that gave this piece adds; a token that ends the text has no score."""
        score = self._score if self.stop_reason != "end" else None
        if score is not None:
            self._offset += len(self._decoded.step(score.token))
        return Said(self._number, piece, score, self.stop_reason)
