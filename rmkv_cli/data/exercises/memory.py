"""Memory tasks as exercises: the prompt ends where the first answer begins."""

from collections.abc import Sequence

import numpy as np

from rmkv_cli.config import FactsSource, TaskSource
from rmkv_cli.data.exercises.exercise import Exercise
from rmkv_cli.data.tasks import make_example, plain_haystack, require_vocabulary
from rmkv_cli.tokenizer import Tokenizer


def memory(task: TaskSource, tokenizer: Tokenizer, rng: np.random.Generator, row: float, segments: int) -> Exercise:
    """Return an example's first question and its answer; copy and reverse ask for all tokens at once.

    Raises:
        UserError: the vocabulary has too few tokens for the task.
    """
    require_vocabulary(task, tokenizer.text_ids, tokenizer.vocab_size)
    if isinstance(task, FactsSource):
        task = task.model_copy(update={"along": False})  # otherwise the first question would follow the first statement
    example = make_example(task, tokenizer, plain_haystack(task, tokenizer), rng, row, segments)
    (start, stop), *rest = example.answers
    for following, end in rest:
        stop = end if following == stop else stop
    tokens = example.tokens.tolist()
    prompt, right = [tokenizer.opening, *tokens[:start]], tokens[start:stop]

    def score(ids: Sequence[int], text: str) -> float:
        return float(list(ids) == right)

    return Exercise(prompt, tokenizer.decode(prompt[1:]), right, len(right), score)
