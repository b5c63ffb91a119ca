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
        model: the model.
        names: names of the tasks.
        include: folder of YAML files with your own tasks, which override the harness's tasks of the same name.
        limit: maximum number of documents of each task.
        num_fewshot: number of solved examples before each question, except in tasks that forbid them.

    Raises:
        UserError: a task or folder does not exist, cannot be loaded or is not supported; or as in `HarnessModel`.
    """
    # Does what lm_eval.simple_evaluate does, except the report on the machine, which runs git and loads transformers.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrapping would fork this process with the model
    with _quiet():
        with progress("loading the tasks", None, "tasks"):
            loaded = _load(names, include)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(f"{name}: tasks that run generated code or show images are not supported")
            default = task.get_config("num_fewshot")
            shots = default if num_fewshot is None or default == 0 else num_fewshot  # a default of 0 forbids examples
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        found = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return HarnessReport(__version__, limit, list(_scores(found)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Redirect the harness's output to stderr, as stdout is for results, and hide the progress bars of data sets."""
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        datasets.enable_progress_bars()


def _load(names: Sequence[str], include: Path | None) -> Any:
    """Return the tasks that the harness loads by these names."""
    if include is not None and not include.is_dir():
        raise UserError(f"{include}: no such folder")
    tasks = TaskManager(include_path=include, include_defaults=False) if include else None
    if tasks is None or not set(names) <= set(tasks.all_subtasks):  # groups and tags may contain tasks of the harness
        tasks = TaskManager(include_path=include)  # reads thousands of files, which takes 13 s
    for name in names:
        if name not in tasks.all_tasks:
            where = f"lm_eval {__version__}" + (f" or {include}" if include else "")
            raise UserError(f"there is no task '{name}' in {where}{did_you_mean(name, tasks.all_tasks)}")
    try:
        return tasks.load(list(names))
    except Exception as error:  # tasks contain code and data by many authors
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
