"""Tasks that only a memory can solve: endless examples for training and evaluation."""

from rmkv_cli.data.tasks.example import Example, Haystack, RandomHaystack, TextHaystack, cycle_documents
from rmkv_cli.data.tasks.generate import make_example, plain_haystack, require_vocabulary, row_axis, task_example

__all__ = [
    "Example",
    "Haystack",
    "RandomHaystack",
    "TextHaystack",
    "cycle_documents",
    "make_example",
    "plain_haystack",
    "require_vocabulary",
    "row_axis",
    "task_example",
]
