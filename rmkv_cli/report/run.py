"""A run as it lies in its folder: config, records, data and evaluations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmkv_cli.config import Config, MixConfig, load_config, load_mix
from rmkv_cli.data.manifest import FILE, Manifest
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.kept import DocumentsReport, Evaluation, kept_evaluations
from rmkv_cli.evaluation.tasks import TaskReport
from rmkv_cli.files import sha256
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.data import MIX
from rmkv_cli.training.metrics import read_metrics

Points = list[tuple[float, float]]
"""Tokens read, and a figure then."""


@dataclass(frozen=True)
class Run:
    """What a run wrote."""

    folder: Path
    name: str
    config: Config
    records: list[dict[str, Any]]
    """Of metrics.jsonl, by their steps."""
    damaged: int
    """Lines of metrics.jsonl that are no records."""
    data: Manifest | MixConfig | None
    """What was prepared, or streamed. None: it is not there any more."""
    data_hash: str | None
    tokenizer_hash: str | None
    evaluations: dict[str, Evaluation]

    def points(self, key: str, part: str | None = None) -> Points:
        """Return the finite numbers under a key of the records, or of that part of them."""
        parts = ((record["tokens"], record.get(part) if part else record) for record in self.records)
        found = ((tokens, its.get(key)) for tokens, its in parts if isinstance(its, dict))
        return [(tokens, value) for tokens, value in found if isinstance(value, int | float) and math.isfinite(value)]

    def bad_steps(self) -> list[dict[str, Any]]:
        """Return the records of the steps that were passed over."""
        return [record for record in self.records if "bad_step" in record]

    def samples(self) -> list[dict[str, Any]]:
        """Return the records that hold a sample."""
        return [record for record in self.records if isinstance(record.get("sample"), dict)]

    def answers(self) -> list[dict[str, Any]]:
        """Return the records that hold an answer to an exercise."""
        return [record for record in self.records if isinstance(record.get("rollout"), dict)]

    def documents(self) -> dict[str, tuple[int, DocumentsReport]]:
        """Return the evaluations on documents by name, each with its step."""
        return {n: (e.step, e.report) for n, e in self.evaluations.items() if isinstance(e.report, DocumentsReport)}

    def tasks(self) -> dict[str, tuple[int, TaskReport]]:
        """Return the evaluations on tasks by name, each with its step."""
        return {n: (e.step, e.report) for n, e in self.evaluations.items() if isinstance(e.report, TaskReport)}


def read_run(folder: Path) -> Run:
    """Return what a run's folder holds.

    Raises:
        UserError: it is no run, or its config or an evaluation is damaged.
    """
    if not (folder / "config.toml").is_file():
        what = "is no run (it has no config.toml)" if folder.is_dir() else "no such folder; wants a run"
        raise UserError(f"{folder}: {what}")
    config = load_config(folder / "config.toml")
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics)
    lines = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    data, data_hash = _data(config, folder)
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json").hash
    except UserError:  # a run that has not begun
        tokenizer = None
    name = folder.resolve().name
    kept = kept_evaluations(folder)
    return Run(folder, name, config, records, lines - len(records), data, data_hash, tokenizer, kept)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs, those that share a name by their folders; errors as in `read_run`, or one is given twice."""
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise UserError(f"{folder}: is given twice; a comparison is of different runs")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _data(config: Config, folder: Path) -> tuple[Manifest | MixConfig | None, str | None]:
    """Return what the run reads, and its hash, if they are still there."""
    try:
        if config.train.data is not None:
            mix = Path(config.train.data)
            return Manifest.load(mix), sha256(mix / FILE)
        return load_mix(folder / MIX), sha256(folder / MIX)
    except UserError:
        return None, None
