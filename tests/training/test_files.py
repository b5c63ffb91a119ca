"""A streamed run records its local files when it begins, and resumes only with the same content."""

import os
import signal
from contextlib import nullcontext

import pytest

from rmkv_cli.config import MixConfig, dump_toml
from rmkv_cli.errors import UserError
from rmkv_cli.files import SMALL
from rmkv_cli.training import files
from rmkv_cli.training.files import current_mix, record_files


@pytest.fixture
def begun(tmp_path):
    """A run's folder, the folder of its texts, and its mix of two sources with files of equal size."""
    run, folder = tmp_path / "run", tmp_path / "texts"
    for made in (run, folder):
        made.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"{name} before")
        os.utime(folder / name, ns=(10**18, 10**18))
    mix = mix_of([str(folder / "a.txt"), str(folder / "b.txt")], [str(folder / "b.txt")])
    record_files(mix, run)
    return run, folder, mix


def mix_of(first, second):
    sources = [("one", first), ("two", second)]
    return MixConfig(sources=[{"kind": "files", "name": name, "weight": 1, "files": files} for name, files in sources])


def names(mix):
    return [source.files for source in mix.sources]


def test_files_of_the_recorded_size_and_time_are_the_same_and_are_not_read(begun, tmp_path, monkeypatch):
    run, _, mix = begun
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail(f"{path} is read"))
    assert current_mix(mix, run, tmp_path / "none.toml") == mix


def test_a_signal_ends_the_hashing_of_a_large_file(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(files, "progress", lambda *_: nullcontext(read.append))
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(1 << 34)

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            record_files(mix_of([str(large)], [str(large)]), tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sum(read) < 1 << 34
    assert not (tmp_path / "files.json").exists()


def test_files_with_another_time_are_the_same_if_their_content_is(begun, tmp_path, monkeypatch):
    run, folder, mix = begun
    os.utime(folder / "a.txt", ns=(2 * 10**18, 2 * 10**18))
    assert current_mix(mix, run, tmp_path / "none.toml") == mix
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail(f"{path} is read"))
    assert current_mix(mix, run, tmp_path / "none.toml") == mix  # the new time is known


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("b.txt after!", "has changed since the run began"),
        ("a longer text", "has changed since the run began"),
        (None, "no such file"),
    ],
)
def test_a_file_that_changed_or_is_gone_is_named(begun, tmp_path, content, what):
    run, folder, mix = begun
    (folder / "b.txt").unlink()
    if content is not None:
        (folder / "b.txt").write_text(content)
    with pytest.raises(
        UserError, match=f"^{folder}/b.txt: {what}; .*restore it, or give a mix that finds it with --mix"
    ):
        current_mix(mix, run, tmp_path / "none.toml")


def test_files_that_were_moved_are_found_by_their_content(begun, tmp_path):
    """Name, size and time do not identify a file."""
    run, folder, mix = begun
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (folder / "a.txt").rename(elsewhere / "b.txt")
    (folder / "b.txt").rename(elsewhere / "a.txt")
    (elsewhere / "c.txt").write_text("came after 1")
    (elsewhere / "mix.toml").write_text(dump_toml(mix_of(["*.txt"], ["**/*.txt"])))
    expected = [[str(elsewhere / "b.txt"), str(elsewhere / "a.txt")], [str(elsewhere / "a.txt")]]
    assert names(current_mix(mix, run, elsewhere / "mix.toml")) == expected
    assert names(current_mix(mix, run, tmp_path / "none.toml")) == expected  # their new place is known
    (elsewhere / "a.txt").write_text("a.txt behind!")
    with pytest.raises(UserError, match=r"else where/a\.txt: has changed"):
        current_mix(mix, run, elsewhere / "mix.toml")


def test_a_run_of_an_earlier_version_has_no_record_of_its_files(begun, tmp_path):
    run, folder, mix = begun
    (run / "files.json").unlink()
    (folder / "b.txt").write_text("other text")
    assert current_mix(mix, run, tmp_path / "none.toml") == mix


def test_the_record_may_be_larger_than_the_mix(begun, tmp_path):
    run, _, mix = begun
    with (run / "files.json").open("a") as file:
        file.write(" " * SMALL)
    assert current_mix(mix, run, tmp_path / "none.toml") == mix


def test_a_damaged_record_is_reported(begun, tmp_path):
    run, _, mix = begun
    (run / "files.json").write_text('{"files": [{"name": 1}]}')
    with pytest.raises(UserError, match=r"files\.json: files\[0\]\.source: is missing"):
        current_mix(mix, run, tmp_path / "none.toml")
