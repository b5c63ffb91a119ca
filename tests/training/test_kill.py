"""Killed at any moment and resumed, a run ends with the same weights and the same curve."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from threading import Lock, get_ident

import pytest
import torch
from compare_runs import curve
from foreign_files import add_foreign, contents, immutable
from safetensors.torch import load_file

from rmkv_cli.config import dump_toml
from rmkv_cli.evaluation import sample
from rmkv_cli.model import find_model
from rmkv_cli.model.checkpoints import list_checkpoints
from rmkv_cli.training import train

SAMPLE = sample.TEXT_TOKENS  # before tests shorten it
MAIN = "rmkv_cli.cli.main:main"
STOPPING = Lock()  # held by the thread that stops the process: two stops at once would be one


def rmkv_train(*arguments, stderr=subprocess.DEVNULL):
    command = [sys.executable, "-m", "rmkv_cli", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def steps(run):
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_run_ended_by_any_signal_resumes_to_the_same_result(make_config, tmp_path, monkeypatch):
    """The end of its terminal, and then a signal upon which it saves, each while steps are taken."""
    monkeypatch.setattr(sample, "TEXT_TOKENS", SAMPLE)
    file, run = tmp_path / "config.toml", tmp_path / "run"
    config = make_config(tokens=2000, checkpoint_every=5, eval_every=10)
    file.write_text(dump_toml(config))
    begin = ["--config", file]
    for number, code in ((signal.SIGHUP, -1), (signal.SIGINT, 130)):
        before = steps(run)
        with rmkv_train(*begin, "--run", run, stderr=subprocess.PIPE) as process:
            while steps(run) <= before + 3 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            last = process.stderr.read().splitlines()[-1]
        assert process.returncode == code
        begin = ["--resume"]
    assert last == f"stopped; resume with: rmkv train --resume --run {run}"
    assert_same(train(config, run, resume=True).run, train(config, tmp_path / "whole").run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "tokens", "kills"), [("make_config", 4500, 6), ("streamed", 3000, 3), ("answering", 6000, 4)]
)
def test_a_run_killed_many_times_ends_the_same(forker, way, tokens, kills, request, tmp_path):
    file = tmp_path / "config.toml"
    config = request.getfixturevalue(way)(tokens=tokens, checkpoint_every=5, eval_every=20)
    file.write_text(dump_toml(config))
    whole = train(config, tmp_path / "whole").run

    run = tmp_path / "killed"
    kill_many_times(forker, file, run, kills)
    assert forker.start(MAIN, "train", "--resume", "--run", run).wait() == 0

    assert_same(run, whole)


@pytest.mark.slow
def test_killed_many_times_among_foreign_files_and_an_immutable_checkpoint_it_ends_the_same(
    forker, make_config, tmp_path
):
    file = tmp_path / "config.toml"
    config = make_config(tokens=4000, checkpoint_every=5, eval_every=20, keep_last=1)
    file.write_text(dump_toml(config))
    whole = train(config, tmp_path / "whole").run

    run = tmp_path / "killed"
    while not list_checkpoints(run):
        kill_many_times(forker, file, run, 1)
    foreign = contents(add_foreign(run / "checkpoints"))
    stays = min(list_checkpoints(run))
    before = contents([stays])
    with immutable(stays):
        kill_many_times(forker, file, run, 4)
        assert forker.start(MAIN, "train", "--resume", "--run", run, err=tmp_path / "said").wait() == 0
    said = (tmp_path / "said").read_text()
    assert said.count("warning: ") == 1
    assert f"{stays} cannot be removed" in said

    assert_same(run, whole)
    assert contents(foreign) == foreign
    assert contents([stays]) == before
    assert {path.name for path in list_checkpoints(run)} == names(whole) | {stays.name}


def kill_many_times(forker, file, run, kills):
    """Begin or resume a run and kill it after a few steps, several times."""
    random = Random(0)
    for _ in range(kills):
        begin = ["--resume"] if (run / "config.toml").exists() else ["--config", file]
        process = forker.start(MAIN, "train", *begin, "--run", run)
        further = steps(run) + random.randint(1, 9)
        while steps(run) < further and process.poll() is None:
            time.sleep(random.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_before_any_step_of_writing_ends_the_same(make_config, tmp_path, monkeypatch):
    """The folder is copied right before each fsync, rename or symlink, as a process that died then would leave it."""
    model = {"num_hidden_layers": 1}
    config = make_config(model, tokens=100, checkpoint_every=1, eval_every=2, eval_tokens=60, keep_last=1)
    whole = tmp_path / "whole"
    deaths = copies_before_each_write(monkeypatch, lambda: train(config, whole), whole, tmp_path / "deaths")
    for run in deaths:
        resume = (run / "config.toml").exists()
        foreign = contents(add_foreign(run / "checkpoints")) if list_checkpoints(run) else {}
        train(config, run, resume=resume)
        assert_same(run, whole)
        theirs = {file.relative_to(run / "checkpoints").parts[0] for file in foreign}
        assert names(run) - theirs <= names(whole)  # nothing left half done
        assert contents(foreign) == foreign
        shutil.rmtree(run)
    assert len(deaths) > 80  # some 33 a checkpoint, of three


def copies_before_each_write(monkeypatch, work, folder, copies):
    """Run `work` in a fork, which stops with all its threads before each of these calls; return copies of the folder
    as it was then."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            monkeypatch.setattr(os, "fsync", stopping(os.fsync))
            for name in ("rename", "replace", "symlink_to"):
                monkeypatch.setattr(Path, name, stopping(getattr(Path, name)))
            work()
            code = 0
        finally:
            os._exit(code)
    made = []
    while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
        made.append(copies / str(len(made)))
        if folder.exists():
            shutil.copytree(folder, made[-1], symlinks=True)
        else:
            made[-1].mkdir(parents=True)
        os.kill(child, signal.SIGCONT)
    assert status == 0
    return made


def stopping(call):
    """Return the function with a stop of this process before it."""

    def stopped(*arguments, **keys):
        with STOPPING:
            signal.pthread_kill(get_ident(), signal.SIGSTOP)
        return call(*arguments, **keys)

    return stopped


def names(run):
    return {path.name for path in (run / "checkpoints").iterdir()}


def assert_same(a, b):
    assert curve(a) == curve(b)
    one, other = (load_file(find_model(run) / "model.safetensors") for run in (a, b))
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert (a / "best").resolve().name == (b / "best").resolve().name
