"""The report's files: index.html, which is complete in itself, and report.md with its pictures beside it."""

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
from rmkv_cli.report.section import Section
from rmkv_cli.report.text import notes, sections
from rmkv_cli.report.verdict import verdict

HTML, MARKDOWN = "index.html", "report.md"
SIGNATURE = "nothing was measured for this page."
"""Words in each report, also in those of earlier versions, that mark it as replaceable by the next one."""


@dataclass(frozen=True)
class Written:
    """A written report: its files and the headline figures."""

    html: Path
    markdown: Path
    runs: dict[str, dict[str, Figure]]
    """Headline figures of each run."""


def write_report(folders: Sequence[Path], out: Path) -> Written:
    """Write the report of a run, or the comparison of several, into the folder `out`.

    It replaces an earlier report there; other files stay.

    Raises:
        UserError: a folder is not a run or is damaged; `out` has files but no report; matplotlib is not installed.
    """
    require_matplotlib()
    _require_report_folder(out)
    runs = read_runs(folders)
    parts = sections(runs)
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"Comparison of {', '.join(run.name for run in runs)}"
    markdown = _markdown(title, runs, parts)
    pictures = {f"{picture.name}.png": picture for part in parts for picture in part.pictures}
    svgs = {name: picture.svg() for name, picture in pictures.items()}
    for name in _pictures_of(out) - pictures.keys():
        (out / name).unlink(missing_ok=True)
    write_text(out / MARKDOWN, markdown)  # first, so that an interrupted report can be replaced
    for picture in pictures.values():
        picture.write_png(out)
    write_text(out / HTML, page(markdown, title, svgs))
    return Written(out / HTML, out / MARKDOWN, {run.name: figures(run) for run in runs})


def _require_report_folder(out: Path) -> None:
    """Raise `UserError` unless `out` is absent, has only hidden files, or has a report."""
    has_files = any(out.glob("[!.]*")) if out.is_dir() else out.exists()
    if has_files and SIGNATURE not in _text(out / MARKDOWN):
        raise UserError(f"{out}: is not empty and has no report; choose another --out")


def _pictures_of(out: Path) -> set[str]:
    """Return the file names of the pictures in an earlier report in `out`; other pictures are not the report's."""
    return set(re.findall(r"^!\[.*\]\(([\w-]+\.png)\)$", _text(out / MARKDOWN), re.MULTILINE))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _markdown(title: str, runs: Sequence[Run], parts: Sequence[Section]) -> str:
    warnings = "\n>\n".join(f"> {note}" for note in notes(runs))
    contents = "\n".join(f"- [{part.title}](#{anchor(part.title)})" for part in parts)
    blocks = [
        f"# {escape(title)}",
        *([verdict(runs[0])] if len(runs) == 1 else []),
        *([warnings] if warnings else []),
        contents,
        *(f"## {part.title}\n\n{part.text}" for part in parts),
        f"---\n\nEvery figure is from training or `rmkv eval`; {SIGNATURE}",
    ]
    return "\n\n".join(blocks) + "\n"
