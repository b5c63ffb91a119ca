"""Writes docs/cli.md from the commands' own help; `--check` fails if it is not up to date."""

import sys
from pathlib import Path

import typer.main
from typer.cli import get_docs_for_click

from rmkv_cli.cli.main import build

PAGE = Path(__file__).parent / "cli.md"


def main() -> None:
    """Write the page, or with `--check` compare it."""
    command = typer.main.get_command(build())
    with command.make_context("rmkv", [], resilient_parsing=True) as context:
        page = get_docs_for_click(obj=command, ctx=context, name="rmkv", title="Command-line reference")
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE} is not up to date: run `make docs`")


if __name__ == "__main__":
    main()
