"""Conversations as pieces: what is asked between <start> and <end>, what the assistant says after it."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rmkv_cli.tokenizer import Piece, Special

ASSISTANT = {"assistant", "gpt", "model", "bot", "chatgpt", "ai"}
_HEADER = re.compile(r"<\|start_header_id\|>(.*?)<\|end_header_id\|>(?:\r?\n){0,2}", re.S)
_MARKS = re.compile(r"<\|(?:begin_of_text|eot_id|eom_id|end_of_text)\|>")
Turn = tuple[str, str]
"""Who speaks, and what."""


def pieces_of(turns: Sequence[Turn]) -> tuple[Piece, ...]:
    """Return a conversation's pieces: each turn that is not the assistant's between START and END, but empty ones."""
    pieces: list[Piece] = []
    for role, content in turns:
        if _is_assistant(role):
            pieces += answer(content)
        elif content:
            pieces += (Special.START, content, Special.END)
    return tuple(pieces)


def _is_assistant(role: str) -> bool:
    return role.strip().lower() in ASSISTANT


def answer(text: str) -> tuple[Piece, ...]:
    """Return an answer's pieces: a thought that it begins with is set between the special tokens."""
    opened, closed, rest = text.lstrip().partition(Special.END_THINK.value)
    if closed and opened.startswith(Special.THINK.value):
        return (Special.THINK, opened.removeprefix(Special.THINK.value), Special.END_THINK, rest)
    return (text,)


def text_of(content: Any) -> str | None:
    """Return a message's text: its content, or the joined "text" parts of a list; None if the content is neither."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if len(known) == len(parts) else None


def read_messages(value: Any) -> list[Turn]:
    """Return the turns of a list of {role, content} (or {from, value}), or of a text with Llama-3 header tokens.

    A text without headers is one turn of the user. A turn of the assistant that is opened and has no content, as where
    an answer is to follow, is none.

    Raises:
        ValueError: it is neither; the message tells what is wrong.
    """
    if isinstance(value, str):
        return list(_llama_turns(value))
    if not isinstance(value, list):
        raise ValueError("is neither a list of messages nor a text")
    turns = []
    for number, message in enumerate(value):
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role", message.get("from")), text_of(message.get("content", message.get("value")))
        if not isinstance(role, str) or content is None:
            raise ValueError(f"message {number + 1} has not both a role and a content that are strings")
        turns.append((role, content))
    return turns


def _llama_turns(text: str) -> Iterator[Turn]:
    parts = _HEADER.split(text)  # what stands before the first header, then role and content in turn
    if before := _MARKS.sub("", parts[0]):
        yield "user", before
    for role, content in zip(parts[1::2], parts[2::2], strict=True):
        turn = role.strip(), _MARKS.sub("", content)
        if turn[1] or not _is_assistant(turn[0]):
            yield turn
