"""A text that is being written: which tokens come, and what is certain of its characters."""

from collections.abc import Collection, Sequence
from typing import Literal

from rmkv_cli.errors import UserError
from rmkv_cli.generation.prompt import NonFiniteError, Prompt
from rmkv_cli.generation.sampler import NONE
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.stop import StopStrings
from rmkv_cli.tokenizer import Token, Tokenizer

StopReason = Literal["end", "stop", "length"]
"""The model ended the text; a stop string came; `max_tokens` were written."""


class Text:
    """A text being generated after a prompt: it takes its tokens and returns characters as soon as they are certain.

    The same prompt, config and seed give the same tokens, whatever other texts are in the batch.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        config: SamplingConfig,
        max_tokens: int,
        stop: Sequence[str] = (),
        ends: Collection[Token] | None = None,
        scores: int | None = None,
        answer: bool = False,
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: the model's.
            prompt: what was read.
            config: how tokens are drawn.
            max_tokens: the most that are written.
            stop: strings, before the first of which the text ends.
            ends: the special tokens that end it; None: those in the tokenizer's `roles`.
            scores: how many of the likeliest tokens to report with each token; None: no log probabilities at all.
            answer: whether it is an answer in a conversation.

        Raises:
            UserError: a wrong `max_tokens`; an empty stop string.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens: should be 1 or more, got {max_tokens}")
        self.logits = prompt.logits
        """(1, V), of the token that is drawn next; at the end, of the one that followed `state`."""
        self.text = ""
        self.ids: list[int] = []
        """Tokens written, those of a stop string included, one that ends the text not."""
        self.end: int | None = None
        """The special token that ended the text, if one did."""
        self.stop_reason: StopReason | None = None
        self.fault: Exception | None = None
        """The error that ended the text, if any; `stop_reason` is None then."""
        self.state = prompt.state
        """All that was read, once the text has ended: the prompt, and all tokens but the last one drawn."""
        self.tokenizer, self.config, self.scores = tokenizer, config, scores
        self.seen = prompt.seen
        """(1, V) bool: which tokens the prompt holds."""
        self.answer = answer
        """Whether it is an answer in a conversation."""
        self.logprobs: list[float] = []
        """ln p of each drawn token under the model, before penalties and filters; with `scores`."""
        self.likeliest: tuple[tuple[int, float], ...] = ()
        """The likeliest tokens at the last token's position, with their ln p; with `scores`."""
        self._max_tokens = max_tokens
        roles = tokenizer.roles
        ends = (roles.answer_ends if answer else roles.ends) if ends is None else ends
        self._ends = {token.id for token in ends}
        self._stop, self._stream = StopStrings(stop), tokenizer.stream(answer)

    @property
    def ended(self) -> bool:
        """Whether the text is complete or has failed."""
        return self.stop_reason is not None or self.fault is not None

    def push(self, token: int) -> str:
        """Take the token that was drawn; return the characters that are certain now.

        After it `stop_reason` is set if the text is at its end; what stands before a stop string is all of it.

        Raises:
            NonFiniteError: NONE was drawn.
        """
        if token == NONE:
            raise NonFiniteError
        if token in self._ends:
            self.stop_reason, self.end = "end", token
            piece = ""
        else:
            self.ids.append(token)
            piece = self._stop.push(self._stream.step(token))
            if self._stop.found is not None:
                self.stop_reason = "stop"
            elif len(self.ids) == self._max_tokens:
                self.stop_reason = "length"
        if self.stop_reason and self._stop.found is None:
            piece += self._stop.push(self._stream.end()) + self._stop.end()
        self.text += piece
        return piece
