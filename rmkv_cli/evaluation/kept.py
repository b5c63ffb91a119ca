"""Evaluations of a run, stored in its folder: each report with its step and its command."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from rmkv_cli.config import load_config
from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.beside import Beside
from rmkv_cli.evaluation.harness_report import HarnessReport
from rmkv_cli.evaluation.measure import Report
from rmkv_cli.evaluation.memory import MemoryEffect
from rmkv_cli.evaluation.ngram import Baseline
from rmkv_cli.evaluation.tasks import TaskReport
from rmkv_cli.files import read_whole, sha256, write_text

FOLDER = "evaluations"
LONGEST = 80  # characters of a name
EXAMPLES = 64  # documents per cell by default


@dataclass(frozen=True)
class DocumentsReport(Report):
    """Report on documents."""

    memory: MemoryEffect | None
    """Effect of the memory; None if it was not requested or cannot be measured."""
    beside: Beside | None = None
    """Comparison with another model on the same documents, if requested."""
    ngram: Baseline | None = None
    """Baseline, if the documents are those that a prepared mix held out."""


@dataclass(frozen=True)
class Evaluation:
    """Result of `rmkv eval` on a run."""

    step: int
    """Step of the checkpoint."""
    command: str
    report: DocumentsReport | TaskReport | HarnessReport


def keep_evaluation(run: Path, name: str, evaluation: Evaluation) -> Path:
    """Write an evaluation into a run's folder, replacing one of the same name, and return the file.

    `documents_name`, `task_name` and `harness_name` return a name for each measurement.
    """
    slug = re.sub(r"[^\w.=,-]+", "-", name.replace("[", "").replace("]", "")).strip("-.")
    if len(slug) > LONGEST:  # the hash keeps names apart that differ only at the end
        slug = f"{slug[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    path = run / FOLDER / f"{slug}.json"
    write_text(path, json.dumps(asdict(evaluation), indent=2) + "\n")
    return path


def kept_evaluations(run: Path) -> dict[str, Evaluation]:
    """Return a run's evaluations by name; raise `UserError` if a file is not an evaluation."""
    found = {}
    for path in sorted((run / FOLDER).glob("[!.]*.json")):
        data = read_whole(path)
        try:
            found[path.stem] = TypeAdapter(Evaluation).validate_json(data)
        except ValueError:
            raise UserError(f"{path}: is not an evaluation of this version of rmkv; remove it") from None
    return found


def documents_name(
    run: Path,
    data: Path,
    split: str,
    documents: Documents,
    max_tokens: int | None,
    memory: bool,
    beside: str | None = None,
) -> str:
    """Return the name of an evaluation on `data`; for the run's own data it begins with the split alone."""
    settings = [] if memory else ["no-memory"]
    if max_tokens is not None and max_tokens < documents.lengths.sum():
        settings.insert(0, f"max-tokens={max_tokens}")
    if beside is not None:
        settings.append(f"beside={beside}")
    if not data.is_dir():
        content = hashlib.sha256(documents.lengths.tobytes())
        for ids in documents:
            content.update(ids.tobytes())
        return _name(f"file-{data.name}", *settings, read={data: content.hexdigest()})
    prepared = load_config(run / "config.toml").train.data
    run_data = (run / "held-out", Path(prepared) if prepared else run / "held-out")
    if data.resolve() in {path.resolve() for path in run_data}:
        return _name(split, *settings)
    return _name(f"{split}-{data.resolve().name}", *settings, read={data: sha256(data / "manifest.json")})


def task_name(
    kind: str, overrides: Mapping[str, object], examples: int, seed: int, mix: Path | None, texts: Sequence[Path]
) -> str:
    """Return the name of an evaluation on a task, with the settings that are not defaults and a hash of its files."""
    settings = [f"{key}={value}".replace(" ", "") for key, value in sorted(overrides.items())]
    settings += [f"examples={examples}"] * (examples != EXAMPLES) + [f"seed={seed}"] * (seed != 0)
    files = [*texts, *([mix / "manifest.json" if mix.is_dir() else mix] if mix else [])]
    return _name(kind, *settings, read={file: sha256(file) for file in files})


def harness_name(tasks: Sequence[str], include: Path | None, limit: int | None, num_fewshot: int | None) -> str:
    """Return the name of an evaluation on tasks of lm-evaluation-harness."""
    how = {"num_fewshot": num_fewshot, "limit": limit}
    settings = [f"{key}={value}" for key, value in how.items() if value is not None]
    files = [path for path in include.rglob("*") if path.suffix in {".yaml", ".yml"}] if include else []
    return _name("harness", *sorted(tasks), *settings, read={file: sha256(file) for file in files})


def _name(*parts: str, read: Mapping[Path, str] | None = None) -> str:
    """Join the parts into a name; append a hash of the paths and contents of the files in `read`."""
    if read:
        files = sorted((str(path.resolve()), content) for path, content in read.items())
        parts = (*parts, hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8])
    return " ".join(parts)
