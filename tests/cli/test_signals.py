"""A signal ends a command at any moment of its start, although imports take seconds and swallow exceptions."""

import random
import signal
import subprocess
import sys

import pytest

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
MODULES = 2000  # number of modules, including PyTorch's, that `train` imports; `serve` imports a few more


def ended_at(module, number, *arguments):
    """Run `rmkv` and send the signal after a number of imported modules; return its exit code and output.

    The count begins with rmkv's own first module; before it, Python itself is starting.
    """
    command = [sys.executable, "-X", "importtime", "-m", "rmkv_cli", *map(str, arguments)]
    messages, modules = [], 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if not line.startswith("import time:"):
                messages.append(line)
            elif modules or line.endswith(" rmkv_cli.cli\n"):
                modules += 1
                if modules == module:
                    process.send_signal(number)
    return process.returncode, "".join(messages)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["train", "serve"])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))], ids="seed{}".format
)
def test_a_signal_during_the_imports_ends_it_at_once_and_leaves_nothing(tmp_path, monkeypatch, command, number, seed):
    monkeypatch.chdir(tmp_path)
    arguments = {"train": ["--preset", "tiny"], "serve": ["--model", "absent"]}[command]  # what they would end by
    module = random.Random(f"{command} {number} {seed}").randrange(1, MODULES)
    assert ended_at(module, number, command, *arguments) == (CODES[number], "")
    assert list(tmp_path.iterdir()) == []
