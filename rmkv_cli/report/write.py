"""The report's files: index.html, which needs nothing but itself, and report.md with its pictures beside it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.pictures import require_matplotlib
from rmkv_cli.files import write_text
from rmkv_cli.markdown import escape
from rmkv_cli.report.figures import Figure, figures
from rmkv_cli.report.page import anchor, page
from rmkv_cli.report.run import Run, read_runs
from rmkv_cli.report.text import Section, notes, sections

HTML, MARKDOWN = "index.html", "report.md"
SIGNATURE = "What the training and `rmkv eval` wrote; nothing was measured for this page."
"""Line in each report that marks it as replaceable by the next one."""


@dataclass(frozen=True)
class Written:
    """Where a report is, and what it tells first."""

    html: Path
    markdown: Path
    runs: dict[str, dict[str, Figure]]
    """Each run's headline figures."""


def write_report(folders: Sequence[Path], out: Path) -> Written:
    """Write the report of a run, or the comparison of several, into the folder `out`, over an older one.

    Other files beside an older report stay.

    Raises:
        UserError: a folder has no run or is damaged; `out` has other files and no report; matplotlib is not installed.
    """
    require_matplotlib()
    _require_own(out)
    runs = read_runs(folders)
    parts = sections(runs)
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"Comparison of {', '.join(run.name for run in runs)}"
    markdown = _markdown(title, runs, parts)
    pictures = {f"{picture.name}.png": picture for part in parts for picture in part.pictures}
    svgs = {name: picture.svg() for name, picture in pictures.items()}
    for name in _pictures_of(out) - pictures.keys():
        (out / name).unlink(missing_ok=True)
    write_text(out / MARKDOWN, markdown)  # first: by it the next report knows the folder, should this one be cut off
    for picture in pictures.values():
        picture.write_png(out)
    write_text(out / HTML, page(markdown, title, svgs))
    return Written(out / HTML, out / MARKDOWN, {run.name: figures(run) for run in runs})


def _require_own(out: Path) -> None:
    """Raise `UserError` unless `out` is absent, has only hidden files, or has a report."""
    others = any(out.glob("[!.]*")) if out.is_dir() else out.exists()
    if others and SIGNATURE not in _text(out / MARKDOWN):
        raise UserError(f"{out}: holds other things and is no report; choose another --out")


def _pictures_of(out: Path) -> set[str]:
    """Return the file names of the pictures in an older report in `out`; the report owns no other pictures."""
    return set(re.findall(r"^!\[.*\]\(([\w-]+\.png)\)$", _text(out / MARKDOWN), re.MULTILINE))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _markdown(title: str, runs: Sequence[Run], parts: Sequence[Section]) -> str:
    told = "\n".join(f"- [{part.title}](#{anchor(part.title)})" for part in parts)
    warnings = "\n>\n".join(f"> {note}" for note in notes(runs))
    blocks = [f"# {escape(title)}", SIGNATURE]
    blocks += [warnings] if warnings else []
    blocks += [told, *(f"## {part.title}\n\n{part.text}" for part in parts)]
    return "\n\n".join(blocks) + "\n"
