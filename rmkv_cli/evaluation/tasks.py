"""Accuracy of a model in a task, by load and by distance."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rmkv_cli.config import TaskSource, parse
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.tasks import (
    Example,
    TextHaystack,
    cycle_documents,
    make_example,
    plain_haystack,
    require_vocabulary,
    row_axis,
)
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.reading import LOGITS, continuing, require_fits, steps
from rmkv_cli.model import RMKV, inference
from rmkv_cli.tokenizer import Tokenizer

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """Result of a task at one difficulty."""

    row: float
    """Value on the task's row axis, for instance the number of pairs."""
    segments: int
    """Number of segments of noise."""
    answers: int
    """Number of answers in all documents. An answer is right if the model gives each of its tokens the highest
    probability, having read the true tokens before it."""
    right: int
    accuracy: float
    standard_error: float | None
    """Standard error of the accuracy. Each document is one draw, because its answers are not independent. None for a
    single document."""


@dataclass(frozen=True)
class TaskReport:
    """A task's accuracy at every combination of its row axis and its segments."""

    task: dict[str, Any]
    """Settings of the task; `kind` names it."""
    axis: str
    """Name of the row axis."""
    examples: int
    """Number of documents per cell."""
    seed: int
    cells: list[Cell]
    """Cells, row by row."""


def task_accuracy(
    model: RMKV,
    task: TaskSource,
    tokenizer: Tokenizer,
    text: Sequence[NDArray[Any]] | None = None,
    *,
    examples: int = 64,
    seed: int = 0,
    batch_tokens: int = 8192,
    advance: Callable[[float], None] = lambda documents: None,
) -> TaskReport:
    """Measure how often the model answers correctly on generated documents, each read alone and from its start.

    The documents of a cell depend only on the seed, the cell and the task's other settings, not on the other cells.

    Args:
        model: the model; its training mode is restored.
        task: the task. Its `segments` are segments of the model if its `segment_length` is the model's.
        tokenizer: the model's tokenizer.
        text: noise for a task that has `text`: documents as `Tokenizer.encode_document` returns them.
        examples: number of documents per cell.
        seed: seed of the documents.
        batch_tokens: maximum number of tokens in one forward pass, unless a segment is longer; bounds the memory.
        advance: progress callback, called with the number of documents just read, in fractions.

    Raises:
        UserError: the model has no room for the task's tokens or positions, or is not causal; the noise is missing;
            or the model's weights give no numbers.
    """
    if model.config.memory.carry == "layers":
        raise UserError("a model that is not causal (memory.carry = 'layers') sees the answers, so it cannot be scored")
    if examples < 1:
        raise UserError(f"examples: should be 1 or more, got {examples}")
    if task.text is not None and text is None:
        raise UserError(f"the task's noise is the text of '{task.text}', which is missing")
    S = model.config.segment_length
    require_vocabulary(task, tokenizer.text_ids, tokenizer.vocab_size)
    axis, rows = row_axis(task)
    cells = []
    for row in dict.fromkeys(rows):
        for segments in dict.fromkeys(task.segments):
            rng = np.random.default_rng([seed, zlib.crc32(repr(float(row)).encode()), segments])
            noise = plain_haystack(task, tokenizer) if task.text is None else _shuffled(text or (), seed, tokenizer)
            counts = []
            for batch in np.array_split(np.arange(examples), math.ceil(examples / max(1, batch_tokens // S))):
                asked = [make_example(task, tokenizer, noise, rng, row, segments) for _ in batch]
                counts.append(_ask(model, asked, tokenizer, advance))
            cells.append(_cell(row, segments, np.concatenate(counts)))
    return TaskReport(task.model_dump(), axis, examples, seed, cells)


def _shuffled(text: Sequence[NDArray[Any]], seed: int, tokenizer: Tokenizer) -> TextHaystack:
    order = np.random.default_rng(seed).permutation(len(text))
    return TextHaystack(cycle_documents([text[i] for i in order], int(tokenizer.roles.begin is not None)))


def _ask(model: RMKV, examples: list[Example], tokenizer: Tokenizer, advance: Callable[[float], None]) -> Integers:
    """Return the number of answers of each example and how many are right, (examples, 2)."""
    examples = sorted(examples, key=_last)
    documents = [np.concatenate([[tokenizer.opening], example.tokens]) for example in examples]
    lengths = np.array([_last(example) for example in examples])  # nothing after the last answer is read
    require_fits(model, tokenizer.vocab_size, int(lengths.max()))
    # Token i of an example is predicted at position i of its document, which begins with one more token.
    asked = np.zeros((len(examples), lengths[-1]), bool)
    for row, example in zip(asked, examples, strict=True):
        for start, stop in example.answers:
            row[start:stop] = True
    right = np.zeros_like(asked)
    state, device = model.initial_state(len(examples)), model.memory.device
    with inference(model):
        for step in steps(documents, lengths, tokenizer.eod, model, list(asked)):
            hidden, state = model.hidden(step.inputs, continuing(state, step))
            if len(step.targets):
                at = (torch.from_numpy(places).to(device) for places in (step.rows, step.columns))
                found = hidden[tuple(at)]
                if not found.isfinite().all():
                    raise UserError(
                        "the model's results are not numbers: its weights are damaged, or its training diverged"
                    )
                guesses = torch.cat([model.head(part).argmax(-1) for part in found.split(LOGITS)])
                rows = len(examples) - len(step.inputs) + step.rows
                right[rows, step.start + step.columns] = (guesses == step.targets).cpu().numpy()
            advance(len(examples) * step.read / int(lengths.sum()))
    return np.array(
        [
            (len(example.answers), sum(bool(row[start:stop].all()) for start, stop in example.answers))
            for row, example in zip(right, examples, strict=True)
        ]
    )


def _last(example: Example) -> int:
    return max(stop for _, stop in example.answers)


def _cell(row: float, segments: int, counts: Integers) -> Cell:
    """Return the cell of documents, given their numbers of answers and of right ones, (documents, 2).

    The standard error is that of a ratio of two sums over the documents (Cochran, 1977, section 6.4).
    """
    asked, right = counts.T
    n, accuracy = len(counts), right.sum() / asked.sum()
    error = None
    if n > 1:
        error = float(math.sqrt(n / (n - 1) * ((right - accuracy * asked) ** 2).sum()) / asked.sum())
    return Cell(row, segments, int(asked.sum()), int(right.sum()), float(accuracy), error)


def find_task(kind: type[TaskSource], mix: Path | None, overrides: Mapping[str, Any]) -> TaskSource:
    """Return the first task of a kind in a prepared mix, or its defaults without a mix, with the overrides applied.

    Raises:
        UserError: the folder is not a mix or has no such task; the key or value of an override is wrong.
    """
    settings: dict[str, Any] = {}
    if mix is not None:
        found = [source for source in Manifest.load(mix).mix.sources if isinstance(source, kind)]
        if not found:
            name = kind.model_fields["kind"].default
            raise UserError(f"{mix}: its mix has no source of kind '{name}'; leave out --data to use the defaults")
        settings = found[0].model_dump()
    return parse(kind, settings | dict(overrides), "task", set(overrides))


def held_out_text(mix: Path, source: str, tokenizer: Tokenizer) -> list[NDArray[Any]]:
    """Return the held-out documents of a source in a prepared mix, memory-mapped.

    Raises:
        UserError: there are none, or they were made with another tokenizer.
    """
    documents = Documents.open(mix, "validation")
    if documents.tokenizer_hash != tokenizer.hash:
        raise UserError(
            f"{mix}: was made with a different tokenizer than the model's; make the mix with the model's tokenizer.json"
        )
    indices = [i for i, name in enumerate(documents.source_names) if name == source]
    chosen = np.flatnonzero(np.isin(documents.sources, indices))
    if not len(chosen):
        raise UserError(
            f"{mix}: no document of its source '{source}' is held out for the noise; give a text with --text"
        )
    return [documents[int(i)] for i in chosen]
