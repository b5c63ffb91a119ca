"""Live display of training: figures and a progress bar on a terminal, otherwise a plain line every few seconds."""

import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from rmkv_cli.progress import PLAIN_INTERVAL, amount, plural, stderr


class Display:
    """Show each step's figures on stderr; use it as a context manager."""

    def __init__(self, tokens: int, total: int) -> None:
        """Start at `tokens` of `total` tokens."""
        self.console = stderr()
        self.start, self.before, self.total = time.monotonic(), tokens, total
        self.last_line = 0.0
        self.unsupervised = 0
        """Number of steps without a supervised token."""
        self.figures = Text(no_wrap=True, overflow="ellipsis")
        self.bar = Progress(BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
        self.task = self.bar.add_task("", total=total, completed=tokens)
        self.live = Live(Group(self.figures, self.bar), console=self.console, auto_refresh=self.console.is_terminal)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def step(self, record: dict[str, Any]) -> None:
        """Show a step's record, which has the keys of metrics.jsonl."""
        losses = {name: record[name] for name in ("loss", "kl", "align", "reward", "entropy") if name in record}
        if not losses:
            self.unsupervised += 1
            if self.unsupervised & (self.unsupervised - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                steps = plural(self.unsupervised, "such step")
                self.say(f"step {record['step']:,}: no supervised tokens, weights stay unchanged ({steps} so far)")
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items()) or "loss none"
        wait = f"data wait {record['data_wait']:.0%}"
        if "reward" in record:
            written, learned = (amount(record[f"{what}_tokens_per_second"]) for what in ("written", "learned"))
            wait = f"generating {written} tokens/s, {record['data_wait']:.0%} of the time; learning {learned} tokens/s"
        figures = (
            f"step {record['step']:,}  {shown}  lr {record['learning_rate']:.1e}  "
            f"norm {record['grad_norm']:.2f}  {amount(record['tokens_per_second'])} tokens/s  "
            f"{wait}" + (f"  mfu {record['mfu']:.0%}" if "mfu" in record else "")
        )
        self.figures.plain = figures
        self.bar.update(self.task, completed=record["tokens"])
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line >= PLAIN_INTERVAL:
            self.last_line = now
            rate = (record["tokens"] - self.before) / (now - self.start)
            left = max(self.total - record["tokens"], 0) / rate
            self.console.print(f"{figures}  {min(record['tokens'] / self.total, 1):.0%}, {left:.0f} s left")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line)
