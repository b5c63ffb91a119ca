"""Commands and files that the pages ask a reader to run and to save, for tests that do so."""

import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


def blocks(page, language):
    """The page's code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", Path(page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@dataclass
class Command:
    line: str
    """As it stands after `$ rmkv `."""
    typed: str = ""
    """What is typed while it runs: the lines that follow with `> ` before them."""
    stopped: bool = False
    """Whether `^C` follows."""
    shown: list[str] = field(default_factory=list)
    """The other lines that follow: its output."""

    @property
    def words(self):
        return shlex.split(self.line, comments=True)


def session(page):
    """The commands of the page's console blocks, all of which are rmkv's."""
    commands = []
    for line in "".join(blocks(page, "console")).replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            assert line.startswith("$ rmkv "), line
            commands.append(Command(line.removeprefix("$ rmkv ")))
        elif line.startswith("> "):
            commands[-1].typed += line.removeprefix("> ") + "\n"
        elif line == "^C":
            commands[-1].stopped = True
        elif line:
            commands[-1].shown.append(line)
    return commands


def rmkv_stopped(*words):
    """Run the command, and send it Ctrl-C when it has shown its first step; return its exit code and all its output."""
    command = [sys.executable, "-m", "rmkv_cli", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        output = ""
        for line in process.stderr:
            output += line
            if line.startswith("step 1 "):
                process.send_signal(signal.SIGINT)
    return process.returncode, output
