"""Tasks that only a memory solves: examples without end, for training and for evaluation."""

from rmkv_cli.data.tasks.example import Example, Haystack, RandomHaystack, TextHaystack
from rmkv_cli.data.tasks.generate import make_example, plain_haystack, require_vocabulary, row_axis, task_examples

__all__ = [
    "Example",
    "Haystack",
    "RandomHaystack",
    "TextHaystack",
    "make_example",
    "plain_haystack",
    "require_vocabulary",
    "row_axis",
    "task_examples",
]
