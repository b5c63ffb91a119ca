"""metrics.jsonl: one record per line in order of steps. A resumed run continues it exactly."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rmkv_cli.errors import UserError
from rmkv_cli.files import LARGE, require_file, write_text


class Metrics:
    """Records of a run. A step's record has `loss` or `align`; a validation's has `validation` and perhaps `sample`."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file, and drop incomplete lines and records after `step`, which will be written again."""
        self.path = path
        self.records = [record for record in read_metrics(path) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; raise `UserError` if it cannot be written, for instance to a full disk."""
        self.records.append(record)
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def has_validation(self, step: int) -> bool:
        """Return whether there is a validation of this step."""
        return any(record["step"] == step and "validation" in record for record in self.records)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a buffered record that could not be written, which `add` has reported
            self._file.close()


def best_validation(records: Iterable[dict[str, Any]]) -> tuple[float, int | None]:
    """Return the lowest validation loss, in nats per token, and its first step; infinity and None if there is none."""
    losses = ((r["validation"]["loss"], r["step"]) for r in records if "validation" in r)
    return min(((loss, step) for loss, step in losses if math.isfinite(loss)), default=(math.inf, None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete records of a metrics.jsonl, each with `step` and `tokens`; none if there is no file."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return []
    require_file(path, LARGE)
    records = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):  # an incomplete line, from a kill or a full disk, or damage
            record = json.loads(line)
            if _is_record(record):
                records.append(record)
    return records


def _is_record(record: Any) -> bool:
    """Return whether a line's value has the types that the program relies on."""
    if not isinstance(record, dict) or not all(type(record.get(key)) is int for key in ("step", "tokens")):
        return False
    figures = record.get("validation", {"loss": 0})
    if not isinstance(figures, dict) or type(figures.get("loss")) not in (int, float):
        return False
    known = [figure for figure in figures.values() if figure is not None]
    numbers = [x for x in [*record.values(), *known] if type(x) is int]
    return all(type(x) in (int, float) for x in known) and all(abs(x) < 1 << 63 for x in numbers)
