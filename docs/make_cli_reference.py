"""Writes docs/cli.md from the commands' own help; `--check` fails if it is not up to date."""

import sys
from pathlib import Path

import typer.main
from typer.cli import get_docs_for_click

from rmkv_cli.cli.main import build

FOLDER = Path(__file__).parent


def write(name: str, text: str) -> None:
    """Write a page, or with `--check` compare it."""
    page = FOLDER / name
    if "--check" not in sys.argv:
        page.write_text(text, encoding="utf-8")
    elif not page.exists() or page.read_text(encoding="utf-8") != text:
        sys.exit(f"{page} is not up to date: run `make docs`")


def reference() -> str:
    """Return the page."""
    command = typer.main.get_command(build())
    with command.make_context("rmkv", [], resilient_parsing=True) as context:
        return get_docs_for_click(obj=command, ctx=context, name="rmkv", title="Command-line reference")


if __name__ == "__main__":
    write("cli.md", reference())
