"""How well a model predicts text, what its memory does for it, and the baseline to beat."""

from rmkv_cli.evaluation.measure import PositionLoss, Report, Score, measure
from rmkv_cli.evaluation.memory import MemoryEffect, memory_effect
from rmkv_cli.evaluation.ngram import NGram, texts

__all__ = ["MemoryEffect", "NGram", "PositionLoss", "Report", "Score", "measure", "memory_effect", "texts"]
