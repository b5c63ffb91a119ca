"""`rmkv eval --task`."""

import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmkv_cli.cli.loading import find_and_load
from rmkv_cli.cli.options import print_json
from rmkv_cli.cli.save_evaluation import save_evaluation
from rmkv_cli.cli.tables import console, table
from rmkv_cli.config import CopySource, FactsSource, NeedleSource, RecallSource, ReverseSource, TaskSource
from rmkv_cli.errors import UserError
from rmkv_cli.files import require_writable
from rmkv_cli.progress import plural, progress

if TYPE_CHECKING:
    from rmkv_cli.evaluation import TaskReport
    from rmkv_cli.evaluation.tasks import Cell

TASKS: dict[str, type[TaskSource]] = {
    "recall": RecallSource,
    "copy": CopySource,
    "reverse": ReverseSource,
    "needle": NeedleSource,
    "facts": FactsSource,
}


def evaluate_task(
    model: Path,
    kind: str,
    mix: Path | None,
    overrides: Sequence[str],
    texts: Sequence[Path],
    examples: int,
    seed: int,
    picture: Path | None,
    device: str,
    dtype: str,
    adapter: Path | None,
    as_json: bool,
) -> None:
    """Measure the accuracy on a task and print it; if `picture` is given, draw it too."""
    from rmkv_cli.data.documents import Documents
    from rmkv_cli.data.tasks import row_axis
    from rmkv_cli.evaluation import find_task, held_out_text, task_accuracy
    from rmkv_cli.evaluation.kept import task_name
    from rmkv_cli.evaluation.pictures import draw_heat_map, require_matplotlib

    if picture:
        require_matplotlib()
        require_writable(picture)
    settings = dict(_setting(override) for override in overrides)
    task = find_task(TASKS[kind], mix, settings)
    if texts:
        task = task.model_copy(update={"text": ", ".join(map(str, texts))})
    elif task.text is not None and mix is None:
        raise UserError(f"--set text={task.text}: names a source of a mix; give the mix's folder with --data")
    checkpoint, rmkv, tokenizer = find_and_load(model, device, dtype, adapter)
    if "segment_length" not in settings:
        task = task.model_copy(update={"segment_length": rmkv.config.segment_length})
    text: Sequence[Any] | None = None
    if texts:
        text = list(Documents.from_files(texts, tokenizer))
    elif mix is not None and task.text is not None:
        text = held_out_text(mix, task.text, tokenizer)
    total = len(set(row_axis(task)[1])) * len(set(task.segments)) * examples
    with progress(f"evaluating {kind}", total, "documents") as advance:
        report = task_accuracy(rmkv, task, tokenizer, text, examples=examples, seed=seed, advance=advance)
    if picture:
        draw_heat_map(report, picture)
    if as_json:
        print_json(asdict(report))
    else:
        _print(report)
    if checkpoint != model:
        save_evaluation(
            model, task_name(kind, settings, examples, seed, mix, texts), checkpoint, dtype, adapter, report
        )


def _setting(override: str) -> tuple[str, Any]:
    """Return the key and value of a `--set`: a list is parsed as TOML, any other value stays text for validation."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: should be KEY=VALUE, such as segments=[31,127]")
    try:
        return key, tomllib.loads(f"v = {value}")["v"] if value.startswith("[") else value
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--set {key}: '{value}' is not valid TOML: {error}") from None


def _print(report: "TaskReport") -> None:
    columns = list(dict.fromkeys(cell.segments for cell in report.cells))
    rows = [report.cells[start : start + len(columns)] for start in range(0, len(report.cells), len(columns))]
    title, screen = f"{report.axis} \\ segments", console()
    texts = [[_accuracy(cell) for cell in cells] for cells in rows]
    width = max(map(len, [*(text for row in texts for text in row), *(f"{column:,}" for column in columns)]))
    fitting = max(1, (screen.width - len(title) - 4) // (width + 3))  # including column separators
    for first in range(0, len(columns), fitting):
        part = slice(first, first + fitting)
        accuracies = table(title, *(f"{column:,}" for column in columns[part]))
        for cells, row in zip(rows, texts, strict=True):
            accuracies.add_row(f"{cells[0].row:g}", *row[part])
        screen.print(accuracies)
    answers = sum(cell.answers for cell in report.cells)
    screen.print(
        f"{report.task['kind']}: accuracy ± standard error, {plural(report.examples, 'document')} per cell, "
        f"{plural(answers, 'answer')} in all, seed {report.seed}."
    )


def _accuracy(cell: "Cell") -> str:
    error = "" if cell.standard_error is None else f" ±{cell.standard_error:.3f}"
    return f"{cell.accuracy:.3f}{error}"
