"""BPE tokenizers whose special tokens untrusted text cannot forge: rmkv's lossless ones and pretrained models'."""

from rmkv_cli.tokenizer.parts import in_parts
from rmkv_cli.tokenizer.special import BARE, CONTINUED, Piece, Special, Token
from rmkv_cli.tokenizer.stream import Stream
from rmkv_cli.tokenizer.tokenizer import FILES, TEMPLATE, Tokenizer, require_unicode
from rmkv_cli.tokenizer.train import train_tokenizer

__all__ = [
    "BARE",
    "CONTINUED",
    "FILES",
    "TEMPLATE",
    "Piece",
    "Special",
    "Stream",
    "Token",
    "Tokenizer",
    "in_parts",
    "require_unicode",
    "train_tokenizer",
]
