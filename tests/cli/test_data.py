"""`rmkv data`: its output, and how it ends on errors."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from small_run import error_of

from rmkv_cli.cli.main import main
from rmkv_cli.data.sample import _modules
from rmkv_cli.tokenizer import Tokenizer, train_tokenizer

COMMAND = [sys.executable, "-m", "rmkv_cli", "data"]
MIX = """
validation = 0.1
on_error = "skip"
{tokens}
[[sources]]
kind = "files"
name = "questions"
weight = 3
files = ["a.jsonl"]
format = "prompt_response"
[[sources]]
kind = "files"
name = "prose"
weight = 1
files = ["*.txt"]
"""
ENDLESS = """
[[sources]]
kind = "noise"
name = "noise"
weight = 100
vocab = 250
"""


def rmkv(*args, cwd, **rest):
    return subprocess.run([*COMMAND, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=False, **rest)


@pytest.fixture
def forked(forker, folder, monkeypatch):
    """Run `rmkv data` in the folder, in a process that has imported everything; return it, finished."""
    monkeypatch.chdir(folder)
    return partial(forker.run, "data")


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(iter(["some words, and some more"]), 280).save(tmp_path / "t.json")
    lines = [json.dumps({"prompt": f"Twice {i}?", "response": f"<think>{i}+{i}</think>{2 * i}"}) for i in range(200)]
    lines[7:7] = ["{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"Words of number {i:02}. " * (i % 9 + 1))
    (tmp_path / "mix.toml").write_text(MIX.format(tokens=""))
    (tmp_path / "endless.toml").write_text(MIX.format(tokens="tokens = 1_000_000_000_000") + ENDLESS)
    return tmp_path


@pytest.mark.slow
def test_mix_and_inspect_print_the_figures_of_the_mix(folder, forked):
    home = os.environ | {"HOME": str(folder / "home")}
    done = rmkv("mix", "mix.toml", "--tokenizer", "t.json", "--out", "out", "--workers", 2, cwd=folder, env=home)
    assert done.returncode == 0, done.stderr
    assert not (folder / "home").exists()  # no cache is left anywhere
    title, questions, prose, train, validation = done.stdout.splitlines()
    assert title.split()[:4] == ["source", "weight", "wanted", "achieved"]
    assert questions.split()[:3] == ["questions", "3", "75.00%"]
    assert questions.split()[-1] == "1"
    assert prose.split()[:3] == ["prose", "1", "25.00%"]
    assert (train.split(":")[0], validation.split(":")[0]) == ("train", "validation")
    assert "source 'questions': 1 record skipped; the first: a.jsonl:8: is not valid JSON" in done.stderr
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    again = forked("mix", "mix.toml", "--tokenizer", "out", "--out", "two", "--workers", 1, "--json")
    assert json.loads(again.stdout) == manifest

    shown = forked("inspect", "out", "--samples", 1).stdout
    assert "\n[questions] <eod><start>Twice " in shown
    assert "<end><think>" in shown
    surveys = json.loads(forked("inspect", "out", "--json").stdout)
    for survey, source in zip(surveys, manifest["sources"], strict=True):
        same = ("name", "wanted", "achieved", "documents", "tokens", "bytes", "skipped")
        assert {key: survey[key] for key in same} == {key: source[key] for key in same}
        assert survey["shortest"] <= survey["median"] <= survey["longest"]
        assert survey["shortest"] * survey["documents"] <= survey["tokens"]

    assert json.loads(forked("inspect", "out/train-00000.arrow", "--json").stdout) == surveys
    begun = json.loads(forked("inspect", "mix.toml", "--tokenizer", "t.json", "--tokens", "2k", "--json").stdout)
    assert 2000 <= sum(survey["tokens"] for survey in begun) < 2400
    assert [survey["achieved"] for survey in begun] == pytest.approx([0.75, 0.25], abs=0.05)

    (folder / "task.toml").write_text('[[sources]]\nkind="noise"\nname="n"\nweight=1\nvocab=20')  # has no end
    given = ["task.toml", "--tokenizer", "t.json", "--tokens", "2k", "--json"]
    mixed = json.loads(forked("mix", *given, "--out", "noise").stdout)
    assert 2000 <= mixed["sources"][0]["tokens"] < 3000

    questions, prose = json.loads(forked("inspect", "mix.toml", "--json", "--samples", 1).stdout)
    assert (questions["documents"], questions["skipped"], questions["tokens"]) == (200, 1, None)
    assert (prose["documents"], prose["shortest"], prose["longest"]) == (50, 20, 180)
    assert questions["samples"] == ["<start>Twice 0?<end><think>0+0</think>0"]


CHATS = """
validation = 0
supervise = "answers"
[[sources]]
kind = "files"
name = "chats"
weight = 1
files = ["chats.jsonl"]
format = "messages"
"""
CHAT = [("user", "one?"), ("assistant", "<think>é</think>two\x1b[2J"), ("tool", "3"), ("assistant", "4")]


@pytest.fixture
def chats(folder, forked):
    """Two conversations, of which the second ends with a question, prepared in `chats`."""
    messages = [{"role": role, "content": text} for role, text in CHAT]
    lines = [json.dumps({"messages": turns}) for turns in (messages, messages[:3])]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    (folder / "chats.toml").write_text(CHATS)
    done = forked("mix", "chats.toml", "--tokenizer", "t.json", "--out", "chats")
    assert done.returncode == 0, done.stderr
    *_, supervised = done.stdout.splitlines()
    assert re.fullmatch(r"supervised: \d+ tokens of the \d+ for training", supervised)
    return Tokenizer.load(folder / "t.json")


@pytest.mark.slow
def test_the_supervised_tokens_of_a_prepared_mix_are_shown_in_a_pipe_and_in_json(chats, forked):
    shown = forked("inspect", "chats", "--tokens", "1k").stdout
    answer = "⟦<think>é</think>two\x1b[2J<start>⟧"
    assert f"<eod><start>one?<end>{answer}3<end>⟦4<eod>⟧\n" in shown
    assert f"<eod><start>one?<end>{answer}3<end><eod>\n" in shown
    documents = json.loads(forked("inspect", "chats/train-00000.arrow", "--tokens", "1k", "--json").stdout)
    assert sorted(document["end_supervised"] for document in documents) == [False, True]
    for document in documents:
        learned = [token for token, counts in zip(document["ids"], document["supervised"], strict=True) if counts]
        answer = [5, *chats.encode("é"), 6, *chats.encode("two\x1b[2J"), 3]
        assert learned == answer + (chats.encode("4") if document["end_supervised"] else [])
        assert document["supervised_tokens"] == len(learned) + document["end_supervised"]
        assert (document["source"], document["length"]) == ("chats", len(document["ids"]))
    (cut,) = json.loads(forked("inspect", "chats", "--tokens", 9, "--json").stdout)
    assert (len(cut["ids"]), len(cut["supervised"]), cut["end_supervised"]) == (9, 9, None)


def test_the_supervised_tokens_are_coloured_on_a_terminal(folder, chats):
    terminal, child = os.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    command = [*COMMAND, "inspect", "chats", "--tokens", "1k"]
    done = subprocess.run(command, cwd=folder, env=env, stdout=child, stderr=subprocess.PIPE, check=False)
    os.close(child)
    assert done.returncode == 0, done.stderr
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "<start>one?<end>\x1b[1;32m<think>é</think>two" in shown
    assert "\x1b[2J" not in shown  # a text does not command the terminal
    assert "⟦" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["inspect", "."],
            ".: is not a mix (it has no manifest.json); `rmkv data mix . --out NEW` makes one from its texts",
        ),
        (["inspect", "none.toml"], "none.toml: no such file"),
        (["inspect", "train-00000.arrow"], ".: is not a mix"),
        (["sample", "."], ".: already exists"),
        (["sample", "link"], "link: already exists"),
        (["mix", "mix.toml", "--tokenizer", "a.jsonl", "--out", "x"], "a.jsonl: is not a tokenizer file"),
        (["mix", "bad.toml", "--tokenizer", "t.json", "--out", "x"], "source 'b': no/*.md: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, monkeypatch, capsys, args, message):
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("nowhere")
    (folder / "bad.toml").write_text('[[sources]]\nkind="files"\nname="b"\nweight=1\nfiles=["no/*.md"]')
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["rmkv", "data", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {message}")
    assert (ended.value.code, shown.err.count("\n"), shown.out) == (2, 1, "")


def test_characters_that_stdout_cannot_encode_become_question_marks_but_json_escapes_them(folder):
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
    (folder / "00.txt").write_text("né 😀")
    done = rmkv("inspect", "mix.toml", "--samples", 1, cwd=folder, env=ascii_alone)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[prose] n? ?"), done.stderr
    done = rmkv("inspect", "mix.toml", "--samples", 1, "--json", cwd=folder, env=ascii_alone)
    assert json.loads(done.stdout)[1]["samples"] == ["né 😀"]


FULL = ("error: new/out: file too large", "error: file too large")


def test_a_full_disk_is_one_line_and_leaves_nothing(folder):
    before = sorted(folder.iterdir())

    def little_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    args = ["mix", "endless.toml", "--tokenizer", "t.json", "--out", "new/out", "--workers", "2"]
    done = rmkv(*args, cwd=folder, preexec_fn=little_disk)
    assert done.stderr.splitlines()[-1] in FULL
    assert done.returncode == 2
    assert list((folder / "new").iterdir()) == []
    assert [path for path in sorted(folder.iterdir()) if path.name != "new"] == before


def test_a_full_disk_leaves_nothing_of_a_sample(tmp_path, monkeypatch, capsys):
    modules = _modules()[:60]
    monkeypatch.setattr("rmkv_cli.data.sample._modules", lambda: modules)
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert error_of(monkeypatch, capsys, "data", "sample", "new/out") in FULL
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "new").iterdir()) == []


def processes(session):
    """Return the ids of a session's processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@contextmanager
def mixing(folder):
    """Start an endless mix in its own session; at the end of the block, kill the processes that are left."""
    command = [*COMMAND, "mix", "endless.toml", "--tokenizer", "t.json", "--out", "out", "--workers", "2"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True) as mix:
        try:
            yield mix
        finally:
            for number in processes(mix.pid):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_however_a_mix_is_stopped_no_worker_and_no_partial_result_remains(folder, how, code):
    with mixing(folder) as mix:
        aside = folder / f".out.{mix.pid}.part"
        shard = aside / "train-00000.arrow"
        while not (shard.exists() and shard.stat().st_size > 1000):
            assert mix.poll() is None, mix.stderr.read()
            time.sleep(0.05)
        assert len(processes(mix.pid)) > 2
        if how == signal.SIGINT:
            os.killpg(mix.pid, how)  # as a terminal does
        else:
            mix.send_signal(how)
        stderr = mix.communicate()[1]
        assert mix.returncode == code
        assert "Traceback" not in stderr
        while processes(mix.pid):  # pytest's time limit ends it
            time.sleep(0.05)
    assert not (folder / "out").exists()
    assert aside.exists() == (how == signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_while_the_workers_start_shows_no_traceback(folder):
    with mixing(folder) as mix:
        while len(processes(mix.pid)) < 3:  # itself, what counts the resources, and a worker, which now imports
            assert mix.poll() is None, mix.stderr.read()
            time.sleep(0.01)
        os.killpg(mix.pid, signal.SIGINT)
        stderr = mix.communicate()[1]
    assert mix.returncode == 130
    assert "Traceback" not in stderr
    assert not (folder / "out").exists()
