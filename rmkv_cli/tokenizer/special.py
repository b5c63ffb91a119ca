"""Special tokens, and the pieces that make up documents."""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class Token(str):
    """The spelling of a special token, with its id. As a piece it is distinct from untrusted text that spells it."""

    id: int

    def __new__(cls, spelling: str, number: int) -> "Token":
        """Return the token with this spelling and id."""
        token = super().__new__(cls, spelling)
        token.id = number
        return token

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]
        return str.__str__(self), self.id


class Special(Token, Enum):
    """The special tokens of rmkv's own tokenizers, with their ids."""

    PAD = "<pad>", 0
    UNK = "<unk>", 1
    EOD = "<eod>", 2
    """The end of a document. Each document also begins with this token."""
    START = "<start>", 3
    END = "<end>", 4
    """START and END enclose a prompt."""
    THINK = "<think>", 5
    END_THINK = "</think>", 6

    __str__ = str.__str__


Piece: TypeAlias = str | Token
"""Piece of a document. A plain str is untrusted text and never becomes a special token, even if it spells one."""

BARE = Token("", -1)
"""First piece of a document that already has its beginning, so that the tokenizer adds none."""
CONTINUED = Token("", -2)
"""First piece of a later part of a document, whose text continues that of the previous part."""


@dataclass(frozen=True)
class Roles:
    """Roles of a tokenizer's special tokens."""

    begin: Token | None
    """The token that begins a text, if any."""
    eod: Token
    """The end-of-document token."""
    ends: tuple[Token, ...]
    """The tokens that end a text."""
    answer_ends: tuple[Token, ...]
    """The tokens that end an answer in a conversation."""
    never: tuple[int, ...]
    """Ids that are never generated."""
    pad: Token | None = None
    """The padding token, if any."""
    thinking: tuple[Token, Token] | None = None
    """The tokens that enclose a thought, if the tokenizer has them."""


RMKV_ROLES = Roles(
    begin=Special.EOD,
    eod=Special.EOD,
    ends=(Special.EOD,),
    answer_ends=(Special.EOD, Special.START),
    never=(Special.PAD.id, Special.UNK.id),
    pad=Special.PAD,
    thinking=(Special.THINK, Special.END_THINK),
)
"""Roles in rmkv's own tokenizers."""
