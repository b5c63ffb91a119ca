"""Files and folders are written atomically: complete or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rmkv_cli.errors import UserError
from rmkv_cli.files import (
    atomic_directory,
    atomic_file,
    read_json,
    read_whole,
    require_file,
    require_new,
    require_writable,
    sha256,
    write_text,
)


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as aside:
        aside.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask_whichever_library_writes_the_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "text", "x")
        with atomic_file(tmp_path / "tensors") as aside:
            save_file({"x": torch.zeros(1)}, aside)  # by itself, with mode 0600
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail_half_way():
        with atomic_file(path) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_operating_system_errors_name_the_final_path(tmp_path):
    (tmp_path / "file").touch()

    def fail_inside(whole, name):
        with whole(tmp_path / "new") as aside:
            (aside / name).write_text("x")

    for whole, name, said in ((atomic_file, "file", "new/file"), (atomic_directory, "sub/file", "new/sub/file")):
        with pytest.raises(OSError, match=f"{tmp_path}/{said}'"):
            fail_inside(whole, name)


def test_a_folder_appears_complete_and_leftovers_of_a_killed_process_are_removed(tmp_path):
    path = tmp_path / "folder"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):  # a killed container's process had perhaps the number of this one
        (tmp_path / f".folder.{pid}.part").mkdir()
        (tmp_path / f".folder.{pid}.part" / "leftover").touch()
    with atomic_directory(path) as aside:
        assert not list(aside.iterdir())
        (aside / "sub").mkdir()
        (aside / "sub" / "file").write_text("x")
        assert not path.exists()
    assert [p.name for p in path.rglob("*")] == ["sub", "file"]
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "other"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_write_a_folder_leave_each_others_work_alone(tmp_path):
    path = tmp_path / "folder"
    others = [tmp_path / f".folder.{os.getppid()}.part", tmp_path / f".folder.5.{os.getpid()}.part"]
    for other in others:
        other.mkdir()
    writing = atomic_directory(path)
    (writing.__enter__() / "second").touch()
    write_text(path / "first", "the other process ended before")
    with pytest.raises(UserError, match="folder: already exists"):
        writing.__exit__(None, None, None)
    assert [p.name for p in path.iterdir()] == ["first"]
    assert sorted(tmp_path.iterdir()) == sorted([*others, path])


def test_checks_say_what_is_wrong(tmp_path):
    (tmp_path / "empty").touch()
    for path, says in [
        (tmp_path / "absent", "no such file"),
        (tmp_path, "is not a file"),
        (tmp_path / "empty", "is empty"),
    ]:
        with pytest.raises(UserError, match=says):
            require_file(path)
    with pytest.raises(UserError, match="already exists"):
        require_new(tmp_path)


def test_an_unwritable_path_is_reported_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "notes", tmp_path / "file" / "deep" / "notes", Path("/proc/notes")):
        with pytest.raises(UserError, match=r"notes: cannot be written \(.*\); choose another place"):
            require_writable(path)
    require_writable(tmp_path / "folders" / "to" / "come")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    (tmp_path / "small").write_bytes(b"12345")
    assert read_whole(tmp_path / "small", 5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes; a file of this kind has at most 4"):
        read_whole(tmp_path / "small", 4)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a file"):
            read_whole(path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff"])
def test_anything_but_a_json_object_is_damage(tmp_path, text):
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"x\.json: is damaged: not "):
        read_json(tmp_path / "x.json")


def test_sha256_of_a_known_text(tmp_path):
    write_text(tmp_path / "abc", "abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
