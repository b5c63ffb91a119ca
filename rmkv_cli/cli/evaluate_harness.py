"""`rmkv eval --harness`."""

import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rmkv_cli.cli.loading import find_and_load
from rmkv_cli.cli.options import print_json
from rmkv_cli.cli.save_evaluation import save_evaluation
from rmkv_cli.cli.tables import console, table
from rmkv_cli.errors import UserError, pip_install

if TYPE_CHECKING:
    from rmkv_cli.evaluation.harness_report import HarnessReport


def evaluate_harness(
    model: Path,
    names: str,
    include: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    device: str,
    dtype: str,
    adapter: Path | None,
    as_json: bool,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness, given as comma-separated names, and print its scores."""
    if find_spec("lm_eval") is None:
        raise UserError(f"--harness needs lm-evaluation-harness: {pip_install('harness')}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # hide its own bars; torch imports tqdm, which reads this
    from rmkv_cli.evaluation.harness import HarnessModel
    from rmkv_cli.evaluation.harness_tasks import harness_scores
    from rmkv_cli.evaluation.kept import harness_name

    tasks = list(dict.fromkeys(name for part in names.split(",") if (name := part.strip())))
    if not tasks:
        raise UserError("--harness: names no task; give one, for instance --harness hellaswag,piqa")
    checkpoint, rmkv, tokenizer = find_and_load(model, device, dtype, adapter)
    report = harness_scores(HarnessModel(rmkv, tokenizer), tasks, include, limit=limit, num_fewshot=num_fewshot)
    if as_json:
        print_json(asdict(report))
    else:
        _print(report)
    if checkpoint != model:
        save_evaluation(model, harness_name(tasks, include, limit, num_fewshot), checkpoint, dtype, adapter, report)


def _print(report: "HarnessReport") -> None:
    scores = table("task", "n-shot", "documents", "metric", "value", "standard error")
    for score in report.scores:
        scores.add_row(
            score.task,
            "" if score.num_fewshot is None else f"{score.num_fewshot}",
            f"{score.documents:,}",
            score.metric if score.filter == "none" else f"{score.metric} ({score.filter})",
            f"{score.value:.4f}",
            "" if score.standard_error is None else f"{score.standard_error:.4f}",
        )
    screen = console()
    screen.print(scores)
    cut = (
        ""
        if report.limit is None
        else f" Only {report.limit:,} documents per task: not comparable with published scores."
    )
    screen.print(f"lm_eval {report.lm_eval}.{cut}")
