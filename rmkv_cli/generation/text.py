"""A text in progress: its tokens, and the characters that are final."""

from collections.abc import Collection, Sequence
from typing import Literal

from rmkv_cli.errors import UserError
from rmkv_cli.generation.prompt import NonFiniteError, Prompt
from rmkv_cli.generation.sampler import NONE
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.stop import StopStrings
from rmkv_cli.tokenizer import Token, Tokenizer

StopReason = Literal["end", "stop", "length"]
"""Why a text ended: the model ended it, a stop string appeared, or it has `max_tokens` tokens."""


class Text:
    """A text being generated after a prompt: takes tokens and returns characters as soon as they are final.

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
            tokenizer: the model's tokenizer.
            prompt: the reading that the text follows.
            config: settings of sampling.
            max_tokens: greatest number of tokens.
            stop: strings; the text ends before the first one that appears.
            ends: special tokens that end the text; None: those in the tokenizer's `roles`.
            scores: number of likeliest tokens to report with each token; None: no log probabilities.
            answer: whether the text is an answer in a conversation.

        Raises:
            UserError: `max_tokens` is out of bounds; a stop string is empty.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens: should be 1 or more, got {max_tokens}")
        self.logits = prompt.logits
        """(1, V) logits of the next token; at the end, of the token after `state`."""
        self.text = ""
        self.ids: list[int] = []
        """Generated tokens, including those of a stop string but not the special token that ends the text."""
        self.end: int | None = None
        """Special token that ended the text, if any."""
        self.stop_reason: StopReason | None = None
        self.fault: Exception | None = None
        """Error that ended the text, if any; then `stop_reason` is None."""
        self.state = prompt.state
        """State of the prompt; once the text has ended, the state after all tokens except the last one drawn."""
        self.tokenizer, self.config, self.scores = tokenizer, config, scores
        self.seen = prompt.seen
        """(1, V) bool: tokens that occur in the prompt."""
        self.answer = answer
        """Whether the text is an answer in a conversation."""
        self.logprobs: list[float] = []
        """Log probability of each token under the model, before penalties and filters; only with `scores`."""
        self.likeliest: tuple[tuple[int, float], ...] = ()
        """Likeliest tokens at the position of the last token, with their log probabilities; only with `scores`."""
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
        """Take the token that was drawn; return the characters that are now final.

        Set `stop_reason` if the text ends with this token. A text ends before its stop string.

        Raises:
            NonFiniteError: no token could be drawn (NONE).
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
