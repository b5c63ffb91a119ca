"""The tasks of lm-evaluation-harness, and a model's scores in them."""

import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval import __version__, evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from rmkv_cli.errors import UserError, did_you_mean
from rmkv_cli.evaluation.harness import HarnessModel
from rmkv_cli.evaluation.harness_report import HarnessReport, HarnessScore
from rmkv_cli.progress import progress

BOOTSTRAPS = 1000  # a standard error that has no formula is then off by about 2%
UNVERSIONED = ConfigurableTask.VERSION  # "Yaml"


def harness_scores(
    model: HarnessModel,
    names: Sequence[str],
    include: Path | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> HarnessReport:
    """Return a model's scores in tasks, groups or tags of lm-evaluation-harness.

    Args:
        model: what is asked.
        names: of the tasks.
        include: a folder with tasks of one's own, as the harness' YAML files; they go before its own of that name.
        limit: ask only the first documents of each task, so many.
        num_fewshot: solved examples before each question, but for tasks that rule them out.

    Raises:
        UserError: there is no such task or folder, a task cannot be loaded or asked here, or as `HarnessModel` does.
    """
    # As lm_eval.simple_evaluate does, but for its report on the machine: that runs git, and loads transformers.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrapping would fork this process, the model in it
    with _quiet():
        with progress("loading the tasks", None, "tasks"):
            loaded = _load(names, include)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(f"{name}: runs what the model writes as code, or shows it images: not done here")
            own = task.get_config("num_fewshot")
            shots = own if num_fewshot is None or own == 0 else num_fewshot  # a 0 of its own rules them out
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        found = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return HarnessReport(__version__, limit, list(_scores(found)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off stdout, which is for results alone, what the harness prints; and data sets' bars off the screen."""
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        datasets.enable_progress_bars()


def _load(names: Sequence[str], include: Path | None) -> Any:
    """Return what the harness loads by these names."""
    if include is not None and not include.is_dir():
        raise UserError(f"{include}: no such folder")
    tasks = TaskManager(include_path=include, include_defaults=False) if include else None
    if tasks is None or not set(names) <= set(tasks.all_subtasks):  # groups and tags may have tasks of the harness
        tasks = TaskManager(include_path=include)  # which reads thousands of files: 13 s
    for name in names:
        if name not in tasks.all_tasks:
            where = f"lm_eval {__version__}" + (f" or {include}" if include else "")
            raise UserError(f"there is no task '{name}' in {where}{did_you_mean(name, tasks.all_tasks)}")
    try:
        return tasks.load(list(names))
    except Exception as error:  # tasks are code and data of many hands
        what = " ".join(str(error).split())
        raise UserError(f"cannot load {', '.join(names)}: {type(error).__name__}: {what}") from error


def _scores(found: Any) -> Iterator[HarnessScore]:
    for task, figures in (found["results"] | found.get("groups", {})).items():
        version = found["versions"].get(task)
        for key, value in figures.items():
            metric, comma, judged = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = figures.get(f"{metric}_stderr,{judged}")
            yield HarnessScore(
                task=task,
                version=None if version in (None, UNVERSIONED) else str(version),
                num_fewshot=found["n-shot"].get(task),
                documents=figures["sample_len"],
                metric=metric,
                filter=judged,
                value=float(value),
                standard_error=float(error) if isinstance(error, Real) else None,
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            )
