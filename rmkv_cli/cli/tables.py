"""Tables on stdout."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> "Console":
    """Return a console for results, which are shown as they are."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def table(*columns: str) -> "Table":
    """Return an empty table: names in its first column, figures to the right in the others."""
    from rich.table import Table

    empty = Table()
    for i, column in enumerate(columns):
        empty.add_column(column, justify="right" if i else "left", overflow="fold")
    return empty
