"""The local files of a source."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from rmkv_cli.data.records import File, suffix
from rmkv_cli.errors import UserError

NO_RECORDS = {".json", ".ndjson"}  # suffixes of what may be one record, or many, or a text


def find_files(patterns: Sequence[str], base: Path) -> list[File]:
    """Return the files that paths and globs (`**` crosses folders) match from `base`, sorted within a pattern.

    A folder that `datasets` saved to disk stands for its files.

    Raises:
        UserError: a pattern matches nothing, or a file is one of JSON, whose records have no lines.
    """
    found: dict[Path, File] = {}
    for pattern in patterns:
        literal = base / pattern
        if (literal / "state.json").is_file():
            files = _saved_to_disk(literal)
        else:
            matches = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute ones
            files = [literal] if literal.is_file() else [base / m for m in sorted(matches) if (base / m).is_file()]
        if not files:
            what = f"is a folder; its files are {pattern}/**/*.txt, say" if literal.is_dir() else "no such file"
            if (literal / "dataset_dict.json").is_file():
                what = f"holds a folder for each split; name them: {pattern}/train, say"
            raise UserError(f"{literal}: {what}")
        for path in files:
            if suffix(path.name) in NO_RECORDS:
                raise UserError(f"{path}: is it text? name it .txt; is each line a record? name it .jsonl")
            found[path] = File.local(path)
    return list(found.values())


def _saved_to_disk(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{folder / 'state.json'}: is not what `datasets` writes when it saves to disk") from None
