"""The report's files: index.html, which needs nothing but itself, and report.md with its pictures beside it."""

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


@dataclass(frozen=True)
class Written:
    """Where a report is, and what it tells first."""

    html: Path
    markdown: Path
    runs: dict[str, dict[str, Figure]]
    """Each run's headline figures."""


def write_report(folders: Sequence[Path], out: Path) -> Written:
    """Write the report of a run, or the comparison of several, into the folder `out`, over an older one.

    Raises:
        UserError: a folder holds no run, or is damaged; `out` holds other things; matplotlib is not installed.
    """
    require_matplotlib()
    _require_own(out)
    runs = read_runs(folders)
    parts = sections(runs)
    title = f"Report of {runs[0].name}" if len(runs) == 1 else f"Comparison of {', '.join(run.name for run in runs)}"
    markdown = _markdown(title, runs, parts)
    pictures = {f"{picture.name}.png": picture for part in parts for picture in part.pictures}
    svgs = {name: picture.svg() for name, picture in pictures.items()}
    write_text(out / MARKDOWN, markdown)  # first: by it the next report knows the folder, should this one be cut off
    for picture in pictures.values():
        picture.write_png(out)
    for old in out.glob("*.png"):
        if old.name not in pictures:
            old.unlink()
    write_text(out / HTML, page(markdown, title, svgs))
    return Written(out / HTML, out / MARKDOWN, {run.name: figures(run) for run in runs})


def _require_own(out: Path) -> None:
    """Raise `UserError` unless `out` is absent, empty, or holds a report and nothing else."""
    found = {path.name for path in out.glob("*")} if out.is_dir() else set()
    names = {
        name for name in found if not (name[0] == "." and name.endswith(".part"))
    }  # what a killed process left aside
    others = [name for name in names if name not in (HTML, MARKDOWN) and not name.endswith(".png")]
    if (out.exists() and not out.is_dir()) or others or (names and MARKDOWN not in names):
        raise UserError(f"{out}: holds other things and is no report; choose another --out")


def _markdown(title: str, runs: Sequence[Run], parts: Sequence[Section]) -> str:
    told = "\n".join(f"- [{part.title}](#{anchor(part.title)})" for part in parts)
    warnings = "\n>\n".join(f"> {note}" for note in notes(runs))
    blocks = [f"# {escape(title)}", "What the training and `rmkv eval` wrote; nothing was measured for this page."]
    blocks += [warnings] if warnings else []
    blocks += [told, *(f"## {part.title}\n\n{part.text}" for part in parts)]
    return "\n\n".join(blocks) + "\n"
