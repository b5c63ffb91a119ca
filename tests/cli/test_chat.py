"""Chat as a user sees it: with piped lines, and typed at a terminal."""

import fcntl
import inspect
import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios

import pytest
import torch
from small_run import TEXT, error_of, rmkv, save_small_model

from rmkv_cli.cli import chat as command
from rmkv_cli.cli.main import main
from rmkv_cli.generation import Conversation, SamplingConfig, load_notes
from rmkv_cli.tokenizer import Special


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model that never ends an answer by itself; the model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = save_small_model(folder)
    with torch.no_grad():
        model.embedding.weight[Special.START.id] = -1
    model.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture
def run(monkeypatch, capsys, saved):
    """Chats in this process, which is quicker than in one of its own; returns what it wrote to stdout and stderr."""

    def run(*arguments, stdin):
        monkeypatch.setattr(sys, "argv", ["rmkv", "chat", "--model", str(saved[0]), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr()

    return run


def position(notes, saved):
    """Return the number of tokens that saved notes have read."""
    return int(load_notes(notes, *saved[1:]).state.position)


@pytest.mark.slow
def test_lines_are_answered_and_the_memory_survives_the_process(saved, run, tmp_path):
    folder, model, tokenizer = saved
    notes, book = tmp_path / "notes.rmkv", tmp_path / "a book.txt"
    book.write_text(TEXT)
    options = ["--state", notes, "--max-tokens", 12, "--system", "the log"]
    lines = f"the cat\n\n/read {book}\r\n /no command\nthe dog"
    first = rmkv("chat", "--model", folder, *options, "--seed", 7, stdin=lines.encode())
    assert first.returncode == 0, first.stderr
    conversation = Conversation(model, tokenizer, SamplingConfig(seed=7), 12, system="the log")
    messages = ["".join(conversation.say("the cat"))]
    conversation.read([TEXT])
    messages += ["".join(conversation.say(message)) for message in ("/no command", "the dog")]
    assert first.stdout == "".join(f"{answer}\n" for answer in messages)
    assert position(notes, saved) == int(conversation.memory.state.position)
    second = run(*options, "--seed", 10, stdin=b"and the mat\n/quit\nnot read")  # its fourth message draws with 7 + 3
    assert "--system is not set again" in second.err
    assert second.out == "".join(conversation.say("and the mat")) + "\n"
    assert position(notes, saved) == int(conversation.memory.state.position)


def test_an_error_is_one_line_and_the_conversation_continues(saved, run, tmp_path, capsys, monkeypatch):
    other, absent = tmp_path / "other.rmkv", tmp_path / "absent"
    Conversation(*save_small_model(tmp_path / "model", hidden_size=32), SamplingConfig(), 1).save(other)
    wrong = {
        "/hlep": "/hlep: no such command; did you mean '/help'?",
        "/": "/: no such command; /help shows them",
        "/read": "/read: should be `/read FILE`",
        "/reset now": "/reset: takes no argument",
        f"/read {absent}": f"{absent}: no such file",
        f"/load {tmp_path}": f"{tmp_path}: is not a file",
        f"/load {other}": f"{other}: was made with a different model",
        f"/save {other}": f"{other}: already exists",
        f"/save {other}/x": f"{other}/x: cannot be written ({other}: Not a directory)",
        "/read ~absentee/x": "~absentee/x: no such file",
        "\udcff": "character 1 of the text is a lone surrogate",
    }
    stdin = "\n".join([*wrong, "the cat"]).encode(errors="surrogateescape")
    out, err = run("--max-tokens", 5, stdin=stdin)
    shown = err.splitlines()
    for line, expected in zip(shown, wrong.values(), strict=True):
        assert line.startswith(f"error: {expected}")
    assert out.strip()

    def error(*arguments):
        return error_of(monkeypatch, capsys, "chat", "--model", saved[0], *arguments)

    assert "cannot be written" in error("--state", other / "notes.rmkv")  # before a word is said

    assert "was made with a different model" in error("--state", other)
    assert "sampling: top_p: should be less than or equal to 1" in error("--top-p", 2)
    assert "max_tokens: should be 1 or more" in error("--max-tokens", 0)


def test_the_commands_do_what_help_says(saved, run, tmp_path):
    branch, notes = tmp_path / "branch.rmkv", tmp_path / "notes.rmkv"
    lines = f"/help\nthe cat\n/save {branch}\n/stats\nthe dog\n/save {notes}\n/reset\n/stats\n/load {branch}\n/stats"
    err = run("--state", notes, "--max-tokens", 9, stdin=lines.encode()).err
    assert all(f"{name} " in err for name in command.COMMANDS)
    tokens = [int(n) for n in re.findall(r"(\d+) tokens? so far, in a state of [\d,]+ bytes", err)]
    assert tokens == [position(branch, saved), 1, position(branch, saved)]
    assert position(notes, saved) == position(branch, saved)  # of the end
    assert re.search(r"last turn: read \d+ tokens at [\d,]+/s, generated 9 at [\d,]+/s", err)


def test_the_options_default_to_the_librarys_values():
    defaults = {name: p.default for name, p in inspect.signature(command.chat).parameters.items()}
    library = SamplingConfig().model_dump(exclude={"seed"})
    assert {name: defaults[name] for name in library} == library


class Terminal:
    """A process at its own terminal: type into it and read what it shows."""

    def __init__(self, home, *arguments):
        self.master, slave = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rmkv_cli", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, keys):
        os.write(self.master, keys.encode())

    def see(self, pattern):
        """Wait until the new output matches; return the match."""
        while not (found := re.search(pattern, self.shown)):  # pytest's time limit ends it
            try:
                self.shown += os.read(self.master, 4096).decode(errors="replace")
            except OSError:  # nobody holds its other end any more
                raise AssertionError(self.shown[-2000:]) from None
        self.shown = self.shown[found.end() :]
        return found


PROMPT = r"\x1b\[\?2004h"  # from here on pasted text is marked


@pytest.mark.slow
def test_a_conversation_at_a_terminal(saved, tmp_path):
    notes, home = tmp_path / "notes.rmkv", tmp_path / "home"
    options = ["chat", "--model", saved[0], "--state", notes, "--seed", 1]
    with Terminal(home, *options, "--max-tokens", 100_000_000) as terminal:
        terminal.see("/help shows the commands")
        terminal.see(PROMPT)
        terminal.type("the cat\x1b\rand the dog\r")  # Alt-Enter: a message of two lines
        terminal.see(r"the dog(.|\n){300}")
        terminal.type("\x03")  # Ctrl-C, in the midst of the answer
        terminal.see("stopped")
        terminal.see(PROMPT)
        terminal.type("nothing\x03")  # drops the line
        terminal.see(PROMPT)
        terminal.type("/sta\t\r")  # Tab completes the command
        so_far = int(terminal.see(r"([\d,]+) tokens so far")[1].replace(",", ""))
        terminal.see(PROMPT)
        terminal.type("\x04")  # Ctrl-D
        terminal.see(f"saved {re.escape(str(notes))}")
        assert terminal.process.wait() == 0
    assert position(notes, saved) == so_far > 50
    history = home / "rmkv" / "chat_history"
    assert "+the cat\n+and the dog\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600

    with Terminal(home, *options, "--max-tokens", 5) as terminal:
        terminal.see("continuing from")
        terminal.see(PROMPT)
        terminal.type("\x1b[A\x1b[A\x1b[A\r")  # what was typed first last time
        terminal.see("the cat")
        terminal.see(PROMPT)
        terminal.process.send_signal(signal.SIGTERM)
        terminal.see("saved")
        assert terminal.process.wait() == 143
    assert position(notes, saved) > so_far
