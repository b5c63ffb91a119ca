"""A run as its folder describes it: config, records, data and evaluations."""

import math
import re
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
"""Pairs of the number of tokens read and a figure at that time."""
OWN_DOCUMENTS = re.compile(r"(?!.*-adapter=)validation(-no-memory|-max-tokens=\d+|-beside=.*|-dtype=bf16)*")
"""Names of evaluations on the run's own held-out documents (see `documents_name`), without an adapter."""


@dataclass(frozen=True)
class Run:
    """Contents of a run's folder."""

    folder: Path
    name: str
    config: Config
    records: list[dict[str, Any]]
    """Records of metrics.jsonl, in the order of their steps."""
    damaged: int
    """Number of lines of metrics.jsonl that are not records."""
    data: Manifest | MixConfig | None
    """Manifest of prepared data, or mix of streamed data. None if it no longer exists."""
    data_hash: str | None
    tokenizer_hash: str | None
    evaluations: dict[str, Evaluation]

    def points(self, key: str, part: str | None = None) -> Points:
        """Return the finite numbers under a key of the records, or under a key of the object `part` of each record."""
        parts = ((record["tokens"], record.get(part) if part else record) for record in self.records)
        found = ((tokens, values.get(key)) for tokens, values in parts if isinstance(values, dict))
        return [(tokens, value) for tokens, value in found if isinstance(value, int | float) and math.isfinite(value)]

    def bad_steps(self) -> list[dict[str, Any]]:
        """Return the records of the steps that were skipped."""
        return [record for record in self.records if "bad_step" in record]

    def samples(self) -> list[dict[str, Any]]:
        """Return the records that contain a sample."""
        return [record for record in self.records if isinstance(record.get("sample"), dict)]

    def answers(self) -> list[dict[str, Any]]:
        """Return the records that contain an answer to an exercise."""
        return [record for record in self.records if isinstance(record.get("rollout"), dict)]

    def documents(self) -> dict[str, tuple[int, DocumentsReport]]:
        """Return the evaluations on documents by name, each with its step."""
        return {n: (e.step, e.report) for n, e in self.evaluations.items() if isinstance(e.report, DocumentsReport)}

    def final_evaluation(self) -> tuple[int, DocumentsReport] | None:
        """Return the newest evaluation on the run's own held-out documents, with its step; of several, the largest."""
        found = [evaluation for name, evaluation in self.documents().items() if OWN_DOCUMENTS.fullmatch(name)]
        return max(found, key=lambda evaluation: (evaluation[0], evaluation[1].tokens), default=None)

    def tasks(self) -> dict[str, tuple[int, TaskReport]]:
        """Return the evaluations on tasks by name, each with its step."""
        return {n: (e.step, e.report) for n, e in self.evaluations.items() if isinstance(e.report, TaskReport)}


def read_run(folder: Path) -> Run:
    """Return the contents of a run's folder.

    Raises:
        UserError: it is not a run, or its config or an evaluation is damaged.
    """
    if not (folder / "config.toml").is_file():
        what = "is not a run (it has no config.toml)" if folder.is_dir() else "no such folder; give a run's folder"
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
    """Return the runs; runs that share a name are named by their folders.

    Raises:
        UserError: as in `read_run`; or a run is given twice.
    """
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise UserError(f"{folder}: is given twice; compare different runs")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _data(config: Config, folder: Path) -> tuple[Manifest | MixConfig | None, str | None]:
    """Return the run's data and their hash, if they still exist."""
    try:
        if config.train.data is not None:
            mix = Path(config.train.data)
            return Manifest.load(mix), sha256(mix / FILE)
        return load_mix(folder / MIX), sha256(folder / MIX)
    except UserError:
        return None, None
