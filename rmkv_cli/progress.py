"""Progress on stderr: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_INTERVAL = 5.0
"""Seconds between progress lines when stderr is not a terminal."""


def stderr() -> Console:
    """Return a console that prints messages and progress literally to stderr; stdout is reserved for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def amount(number: float) -> str:
    """Return a number in short form: 12,345, 1.2M, 3.4G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: 1 token, 2,000 tokens."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{amount(task.speed or 0)} {self.unit}/s", style="cyan")


@contextmanager
def progress(title: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """Show progress towards `total` units (None: unknown); yield a function that advances it by a number of units."""
    console = stderr()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        with Progress(*columns, _Rate(unit), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda step: bar.advance(task, step)
    else:
        start = last = time.monotonic()
        done = 0.0

        def advance(step: float) -> None:
            nonlocal last, done
            done += step
            now = time.monotonic()
            if now - last >= PLAIN_INTERVAL:
                last = now
                rate = done / (now - start)
                of = f" of {amount(total)}" if total else ""
                left = f", {max(total - done, 0) / rate:.0f} s left" if total else ""
                console.print(f"{title}: {amount(done)}{of} {unit}, {amount(rate)} {unit}/s{left}")

        yield advance
    console.print(f"{title}: done", style="dim")
