"""A pretrained model's own chat template, rendered so that no message can forge a special token."""

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rmkv_cli.errors import UserError, one_line
from rmkv_cli.tokenizer.special import BARE, Piece, Roles, Token

TRAINED_ON = datetime(2024, 7, 26)
"""The date in training data. With today's date, a template that prints it would make different data of the same mix
every day."""
ASSISTANT = "assistant"
ROLES = {"system", "developer", "user", "tool", ASSISTANT}
"""Roles that templates turn into special tokens, such as <|user|>."""
NOT_BY_TURNS = (
    "the chat template does not render a conversation turn by turn with a token that ends each answer, so its answers "
    'cannot be located; set supervise = "all", or use `rmkv chat --mode single`'
)
_MARKS = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
MARKS = "".join(map(chr, _MARKS))
"""Private-use characters. One that does not occur in the conversation marks text that comes from messages."""


class Message(NamedTuple):
    """A turn as a template reads it."""

    role: str
    content: str
    thought: tuple[int, int] | None = None
    """Indices in the content of the two special tokens that enclose the thought at its beginning."""


class _Generation(Extension):
    """transformers' tag `generation`, which encloses the assistant's text; its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template:
    """A chat template, rendered in jinja2's sandbox with the variables and functions that transformers provides.

    Messages stay text: while the template renders a message, a private-use character breaks up every special token
    that the message spells. The template can still test, strip or cut the message. All special tokens in the result are
    therefore the template's own.
    """

    def __init__(
        self, source: str, tokens: Collection[Token], roles: Roles, named: Mapping[str, str], strips: Mapping[int, str]
    ) -> None:
        """Compile a template.

        Args:
            source: its text.
            tokens: all special tokens.
            roles: their roles.
            named: spellings that a template refers to by name, such as `bos_token`.
            strips: sides on which tokens absorb adjacent white space, by id: "l", "r" or "lr".

        Raises:
            UserError: the text is not a valid template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"its chat template is broken: line {error.lineno}: {one_line(error)}") from None
        self.source = source
        """Its text."""
        self._named, self._strips = dict(named), strips
        self._begin = roles.begin
        self._tokens = {str(token): token for token in tokens}
        self._ends = set(map(str, roles.answer_ends))
        spellings = "|".join(re.escape(token) for token in sorted(self._tokens, key=len, reverse=True)) or "(?!)"
        self._spelt = re.compile(spellings)
        self._spelt_in_any_case = re.compile(spellings, re.IGNORECASE)
        lower = self._lower = [token.lower() for token in self._tokens]
        self._heads = {token[:i] for token in lower for i in range(1, len(token))}
        self._tails = {token[i:] for token in lower for i in range(1, len(token))}
        self._longest = max(map(len, lower), default=0)

    def prompt(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """Return a whole conversation, up to the assistant's next answer; its ids equal those of transformers.

        Raises:
            ValueError: the template refuses the conversation.
        """
        guarded, mark = self._guarded(messages)
        return (BARE, *self._pieces(self._render(guarded, datetime.now(), prompt=True), mark))

    def around(self, messages: Sequence[Message], after: bool) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Return the pieces before and after the content of a user message that is not to be answered.

        Args:
            messages: the messages before it.
            after: whether something else was read before these.

        Raises:
            ValueError: as in `prompt`; the template does not render the message once and whole.
        """
        place = MARKS[-1]
        guarded, mark = self._guarded([*EARLIER[: 2 * after], *messages, Message("user", place)])
        now = datetime.now()
        text = self._after_earlier(guarded, now) if after else self._render(guarded, now)
        before, found, behind = text.partition(place)
        if not found or place in behind:
            raise ValueError("the chat template does not render this message unchanged")
        lead = tuple(self._pieces(before, mark))
        return self._closed(lead) if after else (BARE, *lead), tuple(self._pieces(behind, mark))

    def follow(self, messages: Sequence[Message], closed: bool) -> tuple[Piece, ...]:
        """Return the pieces to read for new messages after an earlier answer, up to the assistant's next answer.

        Args:
            messages: the new ones.
            closed: whether `closing` has been read after the earlier answer.

        Raises:
            ValueError: the template refuses the conversation, or does not render turn by turn.
        """
        guarded, mark = self._guarded([*EARLIER, *messages])
        pieces = tuple(self._pieces(self._after_earlier(guarded, datetime.now(), prompt=True), mark))
        return self._closed(pieces) if closed else pieces

    @property
    def by_turns(self) -> bool:
        """Whether the text after an answer can be read without rereading what came before."""
        return bool(self.closing)

    @cached_property
    def closing(self) -> tuple[Piece, ...]:
        """Pieces between an answer and the next turn; empty if the template has no token that ends an answer."""
        guarded, mark = self._guarded([*EARLIER, EARLIER[0]])
        now = datetime.now()
        try:
            last, more = (tuple(self._pieces(self._after_earlier(guarded[:n], now), mark)) for n in (2, 3))
        except ValueError:
            return ()
        return tuple(piece for piece, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, more, strict=False)))

    def _closed(self, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        """Return the pieces that follow an answer, with `closing` removed."""
        closing = self.closing
        if not closing or pieces[: len(closing)] != closing:
            raise ValueError(NOT_BY_TURNS)
        return pieces[len(closing) :]

    def conversation(
        self, messages: Sequence[Message], train: Sequence[bool], answers_only: bool
    ) -> tuple[tuple[Piece, ...], tuple[bool, ...] | None]:
        """Return the pieces of a training conversation, and flags that say which are learned.

        The token that ends an answer is learned with it. A token boundary is forced at the beginning of each answer, as
        in generation.

        Args:
            messages: the conversation.
            train: for each message, whether its tokens may be learned.
            answers_only: whether only the assistant's messages are learned.

        Returns:
            n pieces, and n + 1 flags (the last is for the document's end) or, if all would be true, None.

        Raises:
            ValueError: the template refuses the conversation, or does not render turn by turn although that is needed.
        """
        guarded, mark = self._guarded(messages)
        whole = self._render(guarded, TRAINED_ON)
        if all(train) and not answers_only:
            return (BARE, *self._pieces(whole, mark)), None
        pieces: list[Piece] = [BARE]
        learned = [False]

        def add(start: int, stop: int, counts: bool) -> None:
            found = list(self._pieces(whole[start:stop], mark, pieces[-1]))
            pieces.extend(found)
            learned.extend([counts] * len(found))

        at, first, ending = 0, 0, not answers_only
        for i, (start, stop, closed) in self._answers(guarded, whole):
            if start < at:
                raise ValueError(NOT_BY_TURNS)
            add(at, start, not answers_only and all(train[first:i]))
            add(start, stop, train[i])
            ending = not answers_only if closed else train[i]
            at, first = stop, i + 1
        rest = not answers_only and all(train[first:])
        add(at, len(whole), rest)
        return tuple(pieces), (*learned, ending if first == len(train) else rest)

    def _answers(self, messages: list[dict[str, str]], whole: str) -> Iterator[tuple[int, tuple[int, int, bool]]]:
        """Yield the index of each answer, where it starts and stops in `whole`, and whether a token ends it."""
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:i], TRAINED_ON, prompt=True)
            so_far = self._render(messages[: i + 1], TRAINED_ON)
            if not whole.startswith(before) or not so_far.startswith(before):
                raise ValueError(NOT_BY_TURNS)
            end, ended = self._end(whole, len(before)), self._end(so_far, len(before)) is not None
            if end is not None and ended:
                yield i, (len(before), end.end(), True)
            elif i == len(messages) - 1:
                yield i, (len(before), len(whole), False)
            else:
                raise ValueError(NOT_BY_TURNS)

    def _end(self, text: str, start: int) -> re.Match[str] | None:
        """Return the match of the first token at or after `start` that ends an answer."""
        return next((match for match in self._spelt.finditer(text, start) if match[0] in self._ends), None)

    def _after_earlier(self, messages: list[dict[str, str]], now: datetime, prompt: bool = False) -> str:
        """Return what a template renders after the answer in `EARLIER`, with which the messages begin."""
        before, whole = self._render(messages[:1], now, prompt=True), self._render(messages, now, prompt)
        end = self._end(whole, len(before))
        if not whole.startswith(before) or end is None:
            raise ValueError(NOT_BY_TURNS)
        return whole[end.start() :]

    def _render(self, messages: list[dict[str, str]], now: datetime, prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                strftime_now=now.strftime,
                **self._named,
            )
        except Exception as error:  # a template is a program: anything can go wrong in it
            message = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses this conversation: {message}") from None

    def _guarded(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], str]:
        """Return messages whose contents spell no special token, and the character inserted to break them up."""
        used = set().union(*(set(text) for message in messages for text in message[:2]))
        mark = next((character for character in MARKS if character not in used), None)
        if mark is None:
            raise ValueError("the conversation uses all of Unicode's private characters")

        def break_up(text: str) -> str:
            text = self._spelt_in_any_case.sub(lambda match: match[0][0] + mark + match[0][1:], text)
            lower = text.lower()  # the edge of a message and the adjacent text could also form a token
            sizes = range(1, min(len(lower) + 1, self._longest))
            head = any(lower[:size] in self._tails for size in sizes)
            head |= 0 < len(lower) < self._longest and any(lower in token for token in self._lower)
            tail = any(lower[-size:] in self._heads for size in sizes)
            return mark * head + text + mark * tail

        def content(message: Message) -> str:
            if message.thought is None:
                return break_up(message.content)
            opened, closed = message.thought
            space, thought = message.content[:opened], message.content[opened:closed]
            open_token = self._spelt.match(thought)
            close_token = self._spelt.match(message.content, closed)
            assert open_token is not None
            assert close_token is not None
            inside = break_up(thought[open_token.end() :])
            return space + open_token[0] + inside + close_token[0] + break_up(message.content[close_token.end() :])

        return [
            {"role": message.role if message.role in ROLES else break_up(message.role), "content": content(message)}
            for message in messages
        ], mark

    def _pieces(self, text: str, mark: str, before: Piece = "") -> Iterator[Piece]:
        """Yield the special tokens of a text and the texts between them; `before` is the preceding piece."""
        at, strips = 0, self._strips.get(before.id, "") if isinstance(before, Token) else ""
        for match in [*self._spelt.finditer(text), None]:
            part = text[at : match.start() if match else len(text)]
            token = self._tokens[match[0]] if match else None
            part = part.lstrip() if "r" in strips else part
            strips = self._strips.get(token.id, "") if token is not None else ""
            part = part.rstrip() if "l" in strips else part
            if part := part.replace(mark, ""):
                yield part
            if match and token is not None:
                yield token
                at = match.end()


EARLIER = Message("user", "Hello."), Message(ASSISTANT, "Hello.")
"""A neutral exchange, used to find out how a template renders later turns."""


def without_begin(pieces: Sequence[Piece], begin: Token | None) -> tuple[Piece, ...]:
    """Return a prompt without the token that begins a document, for reading it after something else."""
    rest = tuple(piece for piece in pieces if piece is not BARE)
    return rest[1:] if rest and isinstance(rest[0], Token) and rest[0] == begin else rest


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
