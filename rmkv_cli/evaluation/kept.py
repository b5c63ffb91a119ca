"""Evaluations of a run, kept in its folder: what was found, of which step, and by which command."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from rmkv_cli.config import load_config
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.harness_report import HarnessReport
from rmkv_cli.evaluation.measure import Report
from rmkv_cli.evaluation.memory import MemoryEffect
from rmkv_cli.evaluation.tasks import TaskReport
from rmkv_cli.files import read_whole, write_text

FOLDER = "evaluations"
LONGEST = 80  # characters of a name


@dataclass(frozen=True)
class DocumentsReport(Report):
    """What was found on documents."""

    memory: MemoryEffect | None
    """None where it was not asked for, or cannot be told."""


@dataclass(frozen=True)
class Evaluation:
    """What `rmkv eval` found of a run."""

    step: int
    """Of the checkpoint."""
    command: str
    report: DocumentsReport | TaskReport | HarnessReport


def keep_evaluation(run: Path, name: str, evaluation: Evaluation) -> Path:
    """Write an evaluation into a run's folder in place of the one of that name; return the file."""
    slug = re.sub(r"[^\w.=,-]+", "-", name.replace("[", "").replace("]", "")).strip("-.")
    if len(slug) > LONGEST:  # many tasks at once: what tells them apart may stand at the end
        slug = f"{slug[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    path = run / FOLDER / f"{slug}.json"
    write_text(path, json.dumps(asdict(evaluation), indent=2) + "\n")
    return path


def kept_evaluations(run: Path) -> dict[str, Evaluation]:
    """Return a run's evaluations by their names; raise `UserError` if a file is none."""
    found = {}
    for path in sorted((run / FOLDER).glob("[!.]*.json")):
        data = read_whole(path)
        try:
            found[path.stem] = TypeAdapter(Evaluation).validate_json(data)
        except ValueError:
            raise UserError(f"{path}: is no evaluation that this version of rmkv kept; remove it") from None
    return found


def documents_name(run: Path, data: Path, split: str) -> str:
    """Return the name of an evaluation on `data`: the split's, and of other data than the run's own theirs as well."""
    if not data.is_dir():
        return f"file-{data.name}"
    own = load_config(run / "config.toml").train.data
    ours = (run / "held-out", Path(own) if own else run / "held-out")
    return split if data.resolve() in {path.resolve() for path in ours} else f"{split}-{data.resolve().name}"
