"""`rmkv report`."""

from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import Json, print_json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folder of a run; several runs are compared.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder. [default: RUN/report; for several: report]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a report of a run, as an HTML page and as Markdown: results, curves, memory, samples, data, config.

    The report measures nothing itself. It includes the results of `rmkv eval --model RUN`, and shows the command for
    each missing one.
    """
    from rmkv_cli.report import write_report

    written = write_report(runs, out or (runs[0] / "report" if len(runs) == 1 else Path("report")))
    if as_json:
        print_json({"html": str(written.html), "markdown": str(written.markdown), "runs": written.runs})
        return
    print(written.html)
    print(written.markdown)
