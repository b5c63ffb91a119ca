"""The special tokens, and the pieces that documents are made of."""

from enum import StrEnum
from typing import TypeAlias


class Special(StrEnum):
    """The special tokens; a member's place in this list is its id in every tokenizer."""

    PAD = "<pad>"
    UNK = "<unk>"
    EOD = "<eod>"
    """The end of a document. Each document also begins with it."""
    START = "<start>"
    END = "<end>"
    """START and END enclose a prompt."""
    THINK = "<think>"
    END_THINK = "</think>"

    @property
    def id(self) -> int:
        """The token's id, 0 to 6."""
        return list(Special).index(self)


Piece: TypeAlias = str | Special
"""A plain str is untrusted text and never becomes a special token, whatever it spells; a `Special` is that token."""
