"""Render conversations as pieces: each prompt between <start> and <end>, followed by the assistant's answer.

Training, `rmkv chat`, `rmkv serve` and prompts from files all use this renderer. The chat template of an exported
folder gives the same ids. If a model folder contains a chat template, that template defines the format instead.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from rmkv_cli.tokenizer import Piece, Special, Token, Tokenizer
from rmkv_cli.tokenizer.template import Message, without_begin

ASSISTANT = {"assistant", "gpt", "model", "bot", "chatgpt", "ai"}
MESSAGE_PART, LONGEST_PART = 1 << 13, 1 << 20  # characters
ROLES = {"human": "user", "prompter": "user"}
"""Names of roles in data sets, and the names that templates know for them."""
TRAIN = ("train", "training", "weight")
"""Keys that exclude a message from the loss if they are false or 0: rmkv's, axolotl's and OpenAI's."""
_HEADER = re.compile(r"<\|start_header_id\|>(.*?)<\|end_header_id\|>(?:\r?\n){0,2}", re.S)
_MARKS = re.compile(r"<\|(?:begin_of_text|eot_id|eom_id|end_of_text)\|>")


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: str
    content: str
    train: bool = True
    """Whether its tokens may count in the loss."""


def pieces_of(
    turns: Iterable[tuple[str, str] | Turn], tokenizer: Tokenizer | None = None, after: bool = False
) -> tuple[Piece, ...]:
    """Return a conversation's pieces, up to the assistant's next answer.

    In rmkv's own format, START and END enclose each turn that is not the assistant's. Empty turns are omitted.

    Args:
        turns: the turns of the conversation.
        tokenizer: determines the format; without it, rmkv's own format.
        after: whether something else was read before, so that no document begins here.

    Raises:
        ValueError: the model's chat template refuses the conversation, or it has none.
    """
    all_turns = [Turn(*turn) for turn in turns]
    require_format(tokenizer)
    if tokenizer is None or tokenizer.template is None:
        return render(without_empty_prompts(all_turns))[0]
    messages = _messages(all_turns, tokenizer)
    if after:
        try:
            return tokenizer.template.follow(messages, closed=True)
        except ValueError:
            pass  # for example a system message, which some templates accept only first
    pieces = tokenizer.template.prompt(messages)
    return without_begin(pieces, tokenizer.roles.begin) if after else pieces


def read_as_message(
    texts: Iterable[str], tokenizer: Tokenizer, system: str = "", after: bool = False
) -> Iterator[Piece]:
    """Yield the pieces for reading a text, given in parts, as a message without an answer.

    Args:
        texts: the parts.
        tokenizer: determines the format.
        system: with a chat template, the system message before the text; "" for none.
        after: whether something else was read before, so that no document begins here.

    Raises:
        ValueError: the model's chat template does not accept such a message, or the model has none.
    """
    require_format(tokenizer)
    if tokenizer.template is None:
        yield from question(texts)
        return
    prefix, suffix = tokenizer.template.around([Message("system", system)] if system else [], after)
    # Template text next to the message is tokenized together with it.
    lead = [piece for piece in prefix[-1:] if not isinstance(piece, Token)]
    trail = [piece for piece in suffix[:1] if not isinstance(piece, Token)]
    yield from prefix[: len(prefix) - len(lead)]
    yield from tokenizer.parts(chain(lead, texts, trail), MESSAGE_PART, LONGEST_PART)
    yield from suffix[len(trail) :]


def _messages(turns: Iterable[Turn], tokenizer: Tokenizer) -> list[Message]:
    """Return turns as template messages, with roles renamed to those that templates know."""
    return [
        Message(ROLES.get(turn.role, turn.role), turn.content)
        if not is_assistant(turn.role)
        else Message("assistant", turn.content, thought_of(turn.content, tokenizer))
        for turn in turns
    ]


def require_format(tokenizer: Tokenizer | None) -> None:
    """Raise `ValueError` if a model takes no conversations, as a pretrained model without a chat template."""
    if tokenizer is not None and tokenizer.foreign and tokenizer.template is None:
        raise ValueError(
            "this model has no chat template, so it takes no conversations; add a chat_template.jinja to the folder of "
            "its tokenizer.json"
        )


def without_empty_prompts(turns: Iterable[Turn]) -> list[Turn]:
    """Return the turns without empty prompts, which no format can express; empty answers stay."""
    return [turn for turn in turns if turn.content or is_assistant(turn.role)]


def render(
    turns: Sequence[Turn], answers_only: bool = False, tokenizer: Tokenizer | None = None
) -> tuple[tuple[Piece, ...], tuple[bool, ...] | None]:
    """Return the pieces of a conversation, and a flag for each piece and for the document's end: is it learned?

    The token that ends an answer belongs to it: the next turn's START, or the end of the document. Tokens of a turn
    with `train` = False are not learned. Answers that follow one another are one text, as in a chat template's result,
    unless only one of them is learned.

    Args:
        turns: the turns of the conversation; all are rendered.
        answers_only: whether only the assistant's turns are learned.
        tokenizer: determines the format; without it, rmkv's own format.

    Returns:
        n pieces, and n + 1 flags or, if all would be true, None.

    Raises:
        ValueError: the model's chat template refuses the conversation, or does not render turn by turn; or it has none.
    """
    require_format(tokenizer)
    if tokenizer is not None and tokenizer.template is not None:
        messages, train = _messages(turns, tokenizer), [turn.train for turn in turns]
        return tokenizer.template.conversation(messages, train, answers_only)
    pieces: list[Piece] = []
    learned: list[bool] = []
    end_learned: bool | None = None  # whether the token that ends the previous answer is learned; None after a prompt
    for turn in turns:
        if is_assistant(turn.role):
            new = answer(turn.content)
            before = pieces[-1] if pieces and end_learned == turn.train else Special.END
            if not isinstance(before, Token) and not isinstance(new[0], Token):
                new = (before + new[0],)
                del pieces[-1], learned[-1]
            pieces += new
            learned += [turn.train] * len(new)
            end_learned = turn.train
        else:
            prompt_learned = turn.train and not answers_only
            pieces += question([turn.content])
            learned += [prompt_learned if end_learned is None else end_learned, prompt_learned, prompt_learned]
            end_learned = None
    learned.append(not answers_only if end_learned is None else end_learned)
    return tuple(pieces), None if all(learned) else tuple(learned)


def question(texts: Iterable[str]) -> Iterator[Piece]:
    """Yield the pieces of a prompt, given in parts: START, the parts, END."""
    yield Special.START
    yield from texts
    yield Special.END


def is_assistant(role: str) -> bool:
    """Return whether a role is the assistant's, by any of its usual names."""
    return role.strip().lower() in ASSISTANT


def answer(text: str, tokenizer: Tokenizer | None = None) -> tuple[Piece, ...]:
    """Return an answer's pieces; special tokens, if the tokenizer has them, enclose a thought at its beginning."""
    thinking = tokenizer.roles.thinking if tokenizer else (Special.THINK, Special.END_THINK)
    if thinking is None or (thought := thought_of(text, tokenizer)) is None:
        return (text,)
    opened, closed = thinking
    start, stop = thought
    return (opened, text[start + len(opened) : stop], closed, text[stop + len(closed) :])


def thought_of(text: str, tokenizer: Tokenizer | None = None) -> tuple[int, int] | None:
    """Return the indices of the two special tokens that enclose the thought at an answer's beginning, if any."""
    thinking = tokenizer.roles.thinking if tokenizer else (Special.THINK, Special.END_THINK)
    start = len(text) - len(text.lstrip())
    if thinking is None or not text.startswith(thinking[0], start):
        return None
    stop = text.find(thinking[1], start + len(thinking[0]))
    return (start, stop) if stop >= 0 else None


def text_of(content: Any) -> str | None:
    """Return a message's text: its content, or the joined "text" parts of a list; None if the content is neither."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if len(known) == len(parts) else None


def text_with_calls(content: Any, calls: Any) -> str | None:
    """Return a message's text and the tool calls after it, each as a JSON object between <tool_call> and </tool_call>.

    Args:
        content: as in `text_of`; it may be None if there are calls.
        calls: OpenAI's `tool_calls`, a list of {"function": {"name", "arguments"}}; None for none.

    Returns:
        The text; None if the content has none.

    Raises:
        ValueError: `calls` has another form.
    """
    if not calls:
        return text_of(content)
    text = text_of(content or "")
    if text is None:
        return None
    parts = [text] if text else []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (0, 0)
        if not isinstance(name, str) or not isinstance(arguments, str | dict):
            raise ValueError("has a tool call without a function's name and arguments")
        arguments_json = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        call_json = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments_json}}}'
        parts.append(f"<tool_call>\n{call_json}\n</tool_call>")
    return "\n".join(parts)


def read_messages(value: Any) -> list[Turn]:
    """Return the turns of a list of {role, content} (or {from, value}), or of a text with Llama-3 header tokens.

    A text without headers is one user turn. An assistant header without content, as at the end of a prompt, gives no
    turn. A message's `tool_calls` become text (see `text_with_calls`). A message with `train`: false, also spelt
    `training`: false or `weight`: 0, is not learned.

    Raises:
        ValueError: the value is neither; the message says what is wrong.
    """
    if isinstance(value, str):
        return list(_llama_turns(value))
    if not isinstance(value, list):
        raise ValueError("is neither a list of messages nor a text")
    return [_turn(message, f"message {number}") for number, message in enumerate(value, 1)]


def _turn(message: Any, name: str) -> Turn:
    message = message if isinstance(message, dict) else {}
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    try:
        text = text_with_calls(content, message.get("tool_calls"))
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if not isinstance(role, str) or text is None:
        raise ValueError(f"{name} should have a role and a content, both strings")
    train = True
    for key in TRAIN:
        if (flag := message.get(key)) is not None:
            if flag not in (0, 1):
                raise ValueError(f"{name}: {key} should be true or false, got {flag!r}")
            train = train and bool(flag)
    return Turn(role, text, train)


def _llama_turns(text: str) -> Iterator[Turn]:
    parts = _HEADER.split(text)  # the text before the first header, then roles and contents alternately
    if before := _MARKS.sub("", parts[0]):
        yield Turn("user", before)
    for role, content in zip(parts[1::2], parts[2::2], strict=True):
        turn = Turn(role.strip(), _MARKS.sub("", content))
        if turn.content or not is_assistant(turn.role):
            yield turn
