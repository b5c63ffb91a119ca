"""The special tokens, and the pieces that documents are made of."""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class Token(str):
    """A special token by its spelling. It is a piece of its own, which no untrusted text can become."""

    id: int

    def __new__(cls, spelling: str, number: int) -> "Token":
        """Return the token with this spelling and id."""
        token = super().__new__(cls, spelling)
        token.id = number
        return token

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]
        return str.__str__(self), self.id


class Special(Token, Enum):
    """The special tokens of rmkv's own tokenizers, in which they have these ids."""

    PAD = "<pad>", 0
    UNK = "<unk>", 1
    EOD = "<eod>", 2
    """The end of a document. Each document also begins with it."""
    START = "<start>", 3
    END = "<end>", 4
    """START and END enclose a prompt."""
    THINK = "<think>", 5
    END_THINK = "</think>", 6

    __str__ = str.__str__


Piece: TypeAlias = str | Token
"""A plain str is untrusted text and never becomes a special token, whatever it spells; a `Token` is that token."""

BARE = Token("", -1)
"""The first piece of a document that begins as its other pieces say, with no token before them."""
CONTINUED = Token("", -2)
"""The first piece of a later part of a document, whose text goes on from the part before."""


@dataclass(frozen=True)
class Roles:
    """What a tokenizer's special tokens are for."""

    begin: Token | None
    """The token that a text begins with, if any."""
    eod: Token
    """The end of a document."""
    ends: tuple[Token, ...]
    """The tokens that end a text."""
    answer_ends: tuple[Token, ...]
    """The tokens that end an answer in a conversation."""
    never: tuple[int, ...]
    """Ids that are never generated."""
    pad: Token | None = None
    thinking: tuple[Token, Token] | None = None
    """The tokens that enclose a thought, if it has them."""


OWN = Roles(
    begin=Special.EOD,
    eod=Special.EOD,
    ends=(Special.EOD,),
    answer_ends=(Special.EOD, Special.START),
    never=(Special.PAD.id, Special.UNK.id),
    pad=Special.PAD,
    thinking=(Special.THINK, Special.END_THINK),
)
"""The roles in rmkv's own tokenizers."""
