"""Byte-level BPE that loses nothing and that untrusted text cannot forge special tokens in."""

from rmkv_cli.tokenizer.parts import in_parts
from rmkv_cli.tokenizer.special import Piece, Special
from rmkv_cli.tokenizer.tokenizer import Stream, Tokenizer, require_unicode
from rmkv_cli.tokenizer.train import train_tokenizer

__all__ = ["Piece", "Special", "Stream", "Tokenizer", "in_parts", "require_unicode", "train_tokenizer"]
