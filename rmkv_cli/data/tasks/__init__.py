"""Tasks that only a memory solves: examples without end, for training and for evaluation."""

from rmkv_cli.data.tasks.example import Example, Haystack, RandomHaystack, TextHaystack, over_and_over
from rmkv_cli.data.tasks.generate import make_example, plain_haystack, require_vocabulary, row_axis, task_example

__all__ = [
    "Example",
    "Haystack",
    "RandomHaystack",
    "TextHaystack",
    "make_example",
    "over_and_over",
    "plain_haystack",
    "require_vocabulary",
    "row_axis",
    "task_example",
]
