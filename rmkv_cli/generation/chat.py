"""A conversation: what the model carries from turn to turn, and what it answers."""

from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rmkv_cli.data.chat import pieces_of, question
from rmkv_cli.errors import UserError
from rmkv_cli.generation.generate import Generation, generate
from rmkv_cli.generation.notes import load_notes, save_notes
from rmkv_cli.generation.prompt import Prompt, read_prompt, read_tokens, require_positions
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.text import ANSWER_ENDS
from rmkv_cli.model import RMKV, reset_recent
from rmkv_cli.tokenizer import Tokenizer

Mode = Literal["single", "instruct", "chat"]
"""How turns hang together.

chat: the conversation is one document, and each turn is read after all those before it.
instruct: the same, but before each message all that is recent is forgotten (see `reset_recent`): earlier turns are
known by slots and store alone.
single: each message is answered on its own, after what was set, read or loaded; a turn leaves no trace.
"""


class Conversation:
    """Answers messages, one after the other. The document is that of the training data (see `rmkv_cli.data.chat`):
    START message END answer START message END answer, and so on.

    The carried state has a fixed size, however long the conversation is. Interrupting the reading of a message or text
    leaves the conversation unchanged. An interrupted answer is kept up to that point, unless a fault ended it.
    """

    def __init__(
        self,
        model: RMKV,
        tokenizer: Tokenizer,
        config: SamplingConfig,
        max_tokens: int,
        mode: Mode = "chat",
        system: str = "",
        start: Prompt | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            model: an RMKV; its training mode is left as it is.
            tokenizer: the one that it was trained with.
            config: how tokens are drawn; the n-th answer draws with the seed + n, from 0.
            max_tokens: the most that an answer has.
            mode: how turns hang together.
            system: what is set before the first message, enclosed as a message is; "" for nothing.
            start: the beginning of each new conversation, with a tuned memory; None: that of any document.

        Raises:
            UserError: a wrong `max_tokens`; as `read_prompt` does.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens: should be 1 or more, got {max_tokens}")
        self.mode = mode
        self.question: Prompt | None = None
        """The last message, as it was read."""
        self.answer: Generation | None = None
        """The answer to it."""
        self._model, self._tokenizer, self._config, self._max_tokens = model, tokenizer, config, max_tokens
        self._system, self._start = system, start
        self._turns = 0
        self._memory: tuple[Prompt, list[int]] = self._beginning(), []  # what is read; tokens written after it

    @property
    def memory(self) -> Prompt:
        """All that was read and written so far, in this session and in those before it, as one reading would be."""
        read, written = self._memory
        if written:
            self._memory = read_tokens(self._model, written, read), []
        return self._memory[0]

    def say(self, message: str) -> Generator[str]:
        """Read a message, and yield the answer's pieces as soon as they are certain.

        The answer ends where the model ends the document or begins a message (neither token is kept), at its greatest
        length, or where the iterator is closed or interrupted.

        Raises:
            UserError: as `read_prompt` does; the turn would pass the end of learned positions.
        """
        memory = self.memory
        if self.mode == "instruct":
            memory = replace(memory, state=reset_recent(memory.state))
        asked = read_prompt(self._model, self._tokenizer, question([message]), memory)
        require_positions(self._model, asked.state, self._max_tokens)
        seed = (self._config.seed + self._turns) % 2**63
        config = self._config.model_copy(update={"seed": seed})
        answer = generate(self._model, self._tokenizer, asked, config, self._max_tokens, ends=ANSWER_ENDS)
        self.question, self.answer = asked, answer
        self._turns += 1
        try:
            yield from answer
        finally:
            if self.mode != "single" and answer.fault is None:
                self._memory = _after(asked, answer)

    def read(self, text: Iterable[str]) -> Prompt:
        """Read a text, in pieces, as a message that is not answered; return its reading. Errors as in `read_prompt`."""
        reading = read_prompt(self._model, self._tokenizer, question(text), self.memory)
        self._memory = reading, []
        return reading

    def reset(self) -> None:
        """Begin anew: only a tuned memory and what was set before the first message are known."""
        self._memory = self._beginning(), []

    def save(self, path: Path) -> None:
        """Write what is carried to a file, whole; errors as in `save_notes`."""
        save_notes(path, self.memory, self._model, self._tokenizer)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` or `rmkv read` wrote instead; errors as in `load_notes`."""
        self._memory = load_notes(path, self._model, self._tokenizer), []

    def _beginning(self) -> Prompt:
        return read_prompt(self._model, self._tokenizer, pieces_of([("system", self._system)]), self._start)


def _after(question: Prompt, answer: Generation) -> tuple[Prompt, list[int]]:
    """Return what is read of a turn, and the tokens of it that were written after that.

    The state of an answer that was cut short, perhaps in the midst of a step, is not told: all of it is to be read.
    """
    held = int(answer.state.position - question.state.position)
    seen = question.seen.clone()
    seen[:, answer.ids[:held]] = True
    return Prompt(held, answer.seconds, answer.logits, answer.state, seen), answer.ids[held:]
