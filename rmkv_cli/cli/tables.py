"""Tables and human-readable sizes on stdout."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> "Console":
    """Return a console that prints results literally to stdout."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def table(*columns: str, title: str | None = None) -> "Table":
    """Return an empty table: the first column is aligned left, the others right."""
    from rich.table import Table

    empty = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        empty.add_column(column, justify="right" if i else "left", overflow="fold")
    return empty


def size(count: int) -> str:
    """Return a number of bytes in short form: 1.5 kB, 2.00 MB, 3.40 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
