"""Processes that are forked from one which has imported everything, for tests that start many: each saves seconds.

Run as a script it is that one: `python forked.py MODULE...` imports the modules, and then does what lines of JSON ask.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


class Forker:
    """Starts processes, in its environment and what each adds to it. To be used in a `with` statement."""

    def __init__(self, *modules, environment=None):
        command = [sys.executable, __file__, *modules]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self._running:
            child.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, *arguments, stdin=b""):
        """Run `rmkv`; return it, finished, with its output as text."""
        with TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("stdin", "out", "err")}
            files["stdin"].write_bytes(stdin)
            code = self.start("rmkv_cli.cli.main:main", *arguments, **files).wait()
            out, err = (files[name].read_text() for name in ("out", "err"))
        assert "Traceback" not in err
        return subprocess.CompletedProcess(arguments, code, out, err)

    def start(self, call, *arguments, stdin=os.devnull, out=os.devnull, err=os.devnull, **environment):
        """Call MODULE:FUNCTION in a process with these arguments in sys.argv, and files for its input and output."""
        asked = {"call": call, "arguments": list(map(str, arguments)), "cwd": os.getcwd()}  # noqa: PTH109
        asked |= {"stdin": str(stdin), "out": str(out), "err": str(err)}
        child = Child(self, self.ask(asked | {"environment": {key: str(x) for key, x in environment.items()}}))
        self._running.append(child)
        return child

    def ask(self, line):
        print(json.dumps(line), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@dataclass
class Child:
    """One of the processes, used like a `subprocess.Popen`."""

    _forker: Forker
    pid: int
    returncode: int | None = None

    def poll(self, how=os.WNOHANG):
        if self.returncode is None:
            self.returncode = self._forker.ask({"wait": self.pid, "how": how})
        return self.returncode

    def wait(self):
        return self.poll(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(asked):
    """Be the new process."""
    os.chdir(asked["cwd"])
    for path, number in ((asked["stdin"], 0), (asked["out"], 1), (asked["err"], 2)):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(asked["environment"])
    sys.argv = ["rmkv", *asked["arguments"]]
    module, _, function = asked["call"].partition(":")
    code = 0
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main():
    for module in sys.argv[1:]:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            pid, status = os.waitpid(asked["wait"], asked["how"])
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            answers.close()
            run(asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
