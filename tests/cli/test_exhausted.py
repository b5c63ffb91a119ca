"""An exhausted disk, memory or thread limit ends every command with one line, and a closed stdout with none."""

import io
import os
import subprocess
import sys
import threading

import pytest
from small_run import error_of, save_small_model

from rmkv_cli.cli.main import main

FULL = "error: standard output: no space left on device\n"
# Each writes to stdout in a different way: print, write, json.dump, a table, Typer's help, streamed pieces.
COMMANDS = {
    "print": ["config", "list"],
    "write": ["config", "show", "--preset", "tiny"],
    "json": ["params", "--preset", "tiny", "--json"],
    "table": ["params", "--preset", "tiny"],
    "help": ["--help"],
    "subcommand-help": ["data", "mix", "--help"],
    "pieces": ["generate", "--model", "model", "--prompt", "a", "--max-tokens", "40"],
    "answers": ["chat", "--model", "model", "--max-tokens", "5"],
    "bytes": ["tokenizer", "decode", "model", "71", "100"],
}
THREADED = {
    "data-mix": ["data", "mix", "mix.toml", "--tokenizer", "model", "--out", "data", "--workers", "1"],
    "serve": ["serve", "--model", "model", "--port", "0"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exhausted")
    save_small_model(folder / "model")
    (folder / "lines.jsonl").write_text('{"prompt": "the cat"}\n')
    return folder


@pytest.fixture
def code_of(folder, monkeypatch):
    """Run a command in this process with the given stdout, which must close without an error; return the exit code."""

    def run(arguments, stdout):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["rmkv", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            main()
        (stdout or sys.stdout).close()
        return ended.value.code

    return run


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_full_stdout_is_one_line_and_exit_code_2(code_of, capsys, arguments):
    assert code_of(arguments, open("/dev/full", "w")) == 2  # noqa: PTH123, SIM115
    assert capsys.readouterr().err == FULL


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_closed_pipe_ends_a_command_quietly(code_of, capsys, arguments):
    read, written = os.pipe()
    os.close(read)
    assert code_of(arguments, open(written, "w")) == 1  # noqa: PTH123, SIM115
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_works_without_a_stdout(code_of, arguments):
    assert code_of(arguments, None) == 0


@pytest.mark.parametrize(
    ("redirected", "code", "stderr"), [(">/dev/full", 2, FULL), ("| true", 1, ""), (">&-", 0, ""), (">&- 2>&-", 0, "")]
)
def test_python_prints_nothing_at_shutdown(redirected, code, stderr):
    line = f'set -o pipefail; "$0" -m rmkv_cli config list {redirected}'
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", line, sys.executable], capture_output=True, text=True, env=buffered)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_exhausted_memory_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    lanes = ["--batch-size", str(10**12)]  # each needs a state
    line = error_of(
        monkeypatch, capsys, "generate", "--model", "model", "--file", "lines.jsonl", "--out", "out", *lanes
    )
    assert line.startswith("error: out of memory: ")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("arguments", THREADED.values(), ids=THREADED)
def test_exhausted_threads_are_one_line(folder, monkeypatch, capsys, arguments):
    monkeypatch.chdir(folder)
    (folder / "mix.toml").write_text('[[sources]]\nkind = "files"\nname = "t"\nweight = 1\nfiles = ["lines.jsonl"]\n')
    size = threading.stack_size(1 << 46)  # larger than the address space
    try:
        line = error_of(monkeypatch, capsys, *arguments)
    finally:
        threading.stack_size(size)
    assert line.startswith("error: cannot start a new thread: ")
    assert not (folder / "data").exists()
