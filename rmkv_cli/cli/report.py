"""`rmkv report`."""

from pathlib import Path
from typing import Annotated

import typer

from rmkv_cli.cli.options import Json, print_json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run's folder; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it goes. [default: RUN/report; of several: report]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page, and its Markdown twin, of what a run wrote: figures, curves, memory, samples, data, config.

    It measures nothing: what `rmkv eval --model RUN` has found is in it, and what is missing is told with its command.
    """
    from rmkv_cli.report import write_report

    written = write_report(runs, out or (runs[0] / "report" if len(runs) == 1 else Path("report")))
    if as_json:
        print_json({"html": str(written.html), "markdown": str(written.markdown), "runs": written.runs})
        return
    print(written.html)
    print(written.markdown)
