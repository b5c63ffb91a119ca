"""Generate examples of any task."""

from collections.abc import Sequence

import numpy as np

from rmkv_cli.config import CopySource, FactsSource, NeedleSource, RecallSource, ReverseSource, TaskSource
from rmkv_cli.data.tasks.example import Example, Haystack, RandomHaystack, TextHaystack, cycle_documents
from rmkv_cli.data.tasks.facts import facts
from rmkv_cli.data.tasks.needle import needle
from rmkv_cli.data.tasks.symbols import alphabet, copy, recall
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Tokenizer

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's


def row_axis(task: TaskSource) -> tuple[str, list[int] | list[float]]:
    """Return the config key and the entries of the list that varies a task's difficulty, besides `segments`."""
    match task:
        case RecallSource():
            return "pairs", task.pairs
        case CopySource() | ReverseSource():
            return "length", task.length
        case NeedleSource():
            return "depth", task.depth
        case FactsSource():
            return "facts", task.facts
    raise TypeError(task)


def require_vocabulary(task: TaskSource, ids: range, vocab_size: int) -> None:
    """Raise `UserError` if a vocabulary has too few `text_ids` for a task's tokens."""
    if isinstance(task, RecallSource | CopySource | ReverseSource):
        others = vocab_size - len(ids)
        required = others + alphabet(task, ids).size
        if required > vocab_size:
            keys = "keys, values" if isinstance(task, RecallSource) else "alphabet"
            raise UserError(
                f"task '{task.name}': with the {others} special tokens it needs {required} ids, but the tokenizer "
                f"has {vocab_size}; lower {keys}{'' if task.text else ' or noise'}"
            )


def plain_haystack(task: TaskSource, tokenizer: Tokenizer) -> Haystack:
    """Return the noise of a task that has no `text`: random tokens, or for needle and facts RULER's five sentences."""
    if isinstance(task, RecallSource | CopySource | ReverseSource):
        return RandomHaystack(alphabet(task, tokenizer.text_ids).noise, task.noise)
    return TextHaystack(cycle_documents([np.array(tokenizer.encode(FILLER * 50))], 0))


def make_example(
    task: TaskSource, tokenizer: Tokenizer, noise: Haystack, rng: np.random.Generator, row: float, segments: int
) -> Example:
    """Return an example of a task; `row` is an entry of its `row_axis`, `segments` the number of segments of noise."""
    match task:
        case RecallSource():
            return recall(task, tokenizer.text_ids, noise, rng, int(row), segments)
        case CopySource() | ReverseSource():
            return copy(task, tokenizer.text_ids, noise, rng, int(row), segments)
        case NeedleSource():
            return needle(task, tokenizer, noise, rng, row, segments)
        case FactsSource():
            return facts(task, tokenizer, noise, rng, int(row), segments)
    raise TypeError(task)


def task_example(task: TaskSource, tokenizer: Tokenizer, noise: Haystack, seed: Sequence[int]) -> Example:
    """Return an example of a task, with its difficulty drawn from the task's lists.

    The seed determines everything but text noise, which continues where the previous example ended.
    """
    rng = np.random.default_rng(seed)
    rows = row_axis(task)[1]
    row, segments = rows[rng.integers(len(rows))], task.segments[rng.integers(len(task.segments))]
    return make_example(task, tokenizer, noise, rng, row, segments)
