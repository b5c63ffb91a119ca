"""A section of the report, and the commands that sections quote."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from rmkv_cli.markdown import code, span
from rmkv_cli.report.pictures import Picture
from rmkv_cli.report.run import Run


@dataclass(frozen=True)
class Section:
    """A heading, the Markdown below it, and the pictures that the Markdown shows."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)


def not_measured(runs: Sequence[Run], *option: str) -> str:
    """Return a section's text where no run has what it shows: the commands that measure it.

    After the option `--data`, each command names its run's held-out documents.
    """
    lines = []
    for run in runs:
        data = [run.config.train.data or run.folder / "held-out"] if option == ("--data",) else []
        lines.append(f"$ {command_line('eval', '--model', run.folder, *option, *data)}")
    commands = "\n".join(lines)
    return f"Not measured yet. To add it to the next report:\n\n{code(commands, 'console')}"


def command_line(*words: object) -> str:
    """Return an rmkv command as a user would type it."""
    return shlex.join(["rmkv", *map(str, words)])


def command(*words: object) -> str:
    """Return an rmkv command as code within a line."""
    return span(command_line(*words))
