"""A conversation: what the model carries from turn to turn, and what it answers."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rmkv_cli.data.chat import pieces_of, question, read_as_message, require_format
from rmkv_cli.errors import UserError
from rmkv_cli.generation.generate import Generation, generate
from rmkv_cli.generation.notes import load_notes, save_notes
from rmkv_cli.generation.prompt import Prompt, read_prompt, read_tokens, require_fit, require_positions
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.model import RMKV, reset_recent
from rmkv_cli.tokenizer import Piece, Tokenizer
from rmkv_cli.tokenizer.template import Message, without_begin

Mode = Literal["single", "instruct", "chat"]
"""How turns hang together.

chat: the conversation is one document, and each turn is read after all those before it.
instruct: the same, but before each message all that is recent is forgotten (see `reset_recent`): earlier turns are
known by slots and store alone.
single: each message is answered on its own, after what was set, read or loaded; a turn leaves no trace.
"""


class Conversation:
    """Answers messages, one after the other, in the format of the training data (see `rmkv_cli.data.chat`).

    The carried state has a fixed size, however long the conversation is. Interrupting the reading of a message or text
    leaves the conversation unchanged. An interrupted answer is kept up to that point, unless a fault ended it.

    With a chat template, the first message begins the document, and the tokens that end an answer are read together
    with the next message.
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
        self.tokenizer = tokenizer
        """The model's tokenizer."""
        self._model, self._config, self._max_tokens = model, config, max_tokens
        self._system, self._start = system, start
        self._turns = 0
        require_fit(model, tokenizer)
        with _refusals():
            require_format(tokenizer)
        self._memory: tuple[Prompt, list[int]] | None  # the reading so far; tokens generated after it
        self._begun: bool  # whether a message has been read in this document
        self._open: bool  # whether the tokens that end the last answer are still unread
        self.reset()

    @property
    def memory(self) -> Prompt:
        """Everything read and generated so far, in this session and earlier ones, as a single reading.

        Raises:
            UserError: nothing has been read.
        """
        if self._memory is None:
            raise UserError("nothing has been read yet")
        read, written = self._memory
        if written:
            self._memory = read_tokens(self._model, written, read), []
        return self._memory[0]

    @property
    def empty(self) -> bool:
        """Whether nothing has been read yet, so that there is no memory."""
        return self._memory is None

    def say(self, message: str) -> Generator[str]:
        """Read a message, and yield the answer's pieces as soon as they are certain.

        The answer ends where the model ends the document or begins a message (neither token is kept), at its greatest
        length, or where the iterator is closed or interrupted.

        Raises:
            UserError: as `read_prompt` does; the turn would pass the end of learned positions; the model's chat
                template refuses the message.
        """
        memory = None if self._memory is None else self.memory
        if self.mode == "instruct" and memory is not None:
            memory = replace(memory, state=reset_recent(memory.state))
        with _refusals():
            pieces = self._asked(message)
        asked = read_prompt(self._model, self.tokenizer, pieces, memory)
        require_positions(self._model, asked.state, self._max_tokens)
        seed = (self._config.seed + self._turns) % 2**63
        config = self._config.model_copy(update={"seed": seed})
        answer = generate(self._model, self.tokenizer, asked, config, self._max_tokens, answer=True)
        self.question, self.answer = asked, answer
        self._turns += 1
        try:
            yield from answer
        finally:
            if self.mode != "single" and answer.fault is None:
                self._memory = _after(asked, answer)
                self._begun = self._open = True

    def _asked(self, message: str) -> Sequence[Piece]:
        """Return the pieces to read for a message that is to be answered."""
        if (template := self.tokenizer.template) is None:
            return tuple(question([message]))
        if self._begun:
            return template.follow([Message("user", message)], closed=not self._open)
        turns = [("system", self._system)] if self._system else []
        pieces = pieces_of([*turns, ("user", message)], self.tokenizer)
        return pieces if self._memory is None else without_begin(pieces, self.tokenizer.roles.begin)

    def read(self, text: Iterable[str]) -> Prompt:
        """Read a text, in pieces, as a message without an answer; return its reading. Errors as in `say`."""
        with _refusals():
            self._close()
            system = "" if self._begun else self._system
            pieces = read_as_message(text, self.tokenizer, system, after=self._memory is not None)
            reading = read_prompt(self._model, self.tokenizer, pieces, self._memory and self.memory)
        self._memory, self._begun = (reading, []), True
        return reading

    def reset(self) -> None:
        """Begin anew: only a tuned memory and what was set before the first message are known."""
        self._memory, self._begun, self._open = None, False, False
        if self.tokenizer.template is None:
            system = pieces_of([("system", self._system)])
            self._memory = read_prompt(self._model, self.tokenizer, system, self._start), []
        elif self._start is not None:
            self._memory = self._start, []

    def save(self, path: Path) -> None:
        """Write the memory to a file, atomically; errors as in `save_notes` and `memory`."""
        with _refusals():
            self._close()
        save_notes(path, self.memory, self._model, self.tokenizer)

    def load(self, path: Path) -> None:
        """Replace the memory by a file that `save` or `rmkv read` wrote; errors as in `load_notes`."""
        self._memory = load_notes(path, self._model, self.tokenizer), []
        self._begun, self._open = True, False

    def _close(self) -> None:
        """Read the tokens that end the last answer."""
        if self._open and self.tokenizer.template is not None:
            closing = self.tokenizer.template.closing
            self._memory = read_prompt(self._model, self.tokenizer, closing, self.memory), []
        self._open = False


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the `ValueError` of a chat template that refuses a conversation into a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def _after(question: Prompt, answer: Generation) -> tuple[Prompt, list[int]]:
    """Return what is read of a turn, and the tokens of it that were written after that.

    The state of an answer that was cut short, perhaps in the midst of a step, is not told: all of it is to be read.
    """
    held = int(answer.state.position - question.state.position)
    seen = question.seen.clone()
    seen[:, answer.ids[:held]] = True
    return Prompt(held, answer.seconds, answer.logits, answer.state, seen), answer.ids[held:]
