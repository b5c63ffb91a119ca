"""Hold a conversation whose state has a fixed size."""

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
"""What each turn knows of earlier ones.

chat: everything; the conversation is one document.
instruct: only what slots and stores contain; the recent window is discarded before each message (see `reset_recent`).
single: nothing; each message is answered on its own, after the system message and the texts that were read or loaded.
"""


class Conversation:
    """A conversation with a model, in the format of the training data (see `rmkv_cli.data.chat`).

    The carried state has a fixed size, however long the conversation is. Interrupting the reading of a message or text
    leaves the conversation unchanged. An interrupted answer is kept up to that point, unless an error ended it.

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
            model: an RMKV; its training mode stays unchanged.
            tokenizer: the model's tokenizer.
            config: settings of sampling; the n-th answer, counted from 0, uses the seed + n.
            max_tokens: greatest number of tokens of an answer.
            mode: what each turn knows of earlier ones.
            system: system message before the first message; "" for none.
            start: beginning of each new conversation, with a tuned memory; None: the beginning of any document.

        Raises:
            UserError: `max_tokens` is out of bounds; errors of `read_prompt`.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens: should be 1 or more, got {max_tokens}")
        self.mode = mode
        self.question: Prompt | None = None
        """Reading that ends with the last message."""
        self.answer: Generation | None = None
        """Answer to the last message."""
        self.tokenizer = tokenizer
        """Tokenizer of the model."""
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
        """Reading of everything so far, in this session and earlier ones, including answers.

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
        """Read a message, and yield the pieces of the answer as soon as they are final.

        The answer ends where the model ends the document or begins a message (neither token is kept), at `max_tokens`,
        or when the iterator is closed or interrupted.

        Raises:
            UserError: errors of `read_prompt`; the turn exceeds the learned positions; the model's chat template
                refuses the message.
        """
        memory = None if self._memory is None else self.memory
        if self.mode == "instruct" and memory is not None:
            memory = replace(memory, state=reset_recent(memory.state))
        with _refusals():
            pieces = self._pieces(message)
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

    def _pieces(self, message: str) -> Sequence[Piece]:
        """Return the pieces to read before the answer to a message."""
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
        """Start a new conversation, from the tuned memory and the system message alone."""
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
        """Replace the memory with a file that `save` or `rmkv read` wrote; errors as in `load_notes`."""
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
    """Return the reading of a turn as far as the answer's state covers it, and the answer's remaining tokens.

    An answer that was interrupted, perhaps during a step, has no state of its own: all its tokens remain.
    """
    covered = int(answer.state.position - question.state.position)
    seen = question.seen.clone()
    seen[:, answer.ids[:covered]] = True
    return Prompt(covered, answer.seconds, answer.logits, answer.state, seen), answer.ids[covered:]
