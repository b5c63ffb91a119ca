"""`rmkv tokenizer`, through the real entry point."""

import json
import resource
import subprocess
import sys

import pytest

from rmkv_cli.tokenizer import train_tokenizer

MIX = '[[sources]]\nkind = "files"\nname = "a"\nweight = 1\nfiles = ["a.txt", "b.txt"]\n'


def rmkv(*args, cwd, stdin=None, limit=None):
    def little_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "rmkv_cli", "tokenizer", *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, check=False, preexec_fn=little_disk if limit else None
    )


def printed(*args, cwd, stdin=None):
    done = rmkv(*args, cwd=cwd, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(iter(["some words, and some more"]), 270).save(tmp_path / "t.json")
    (tmp_path / "a.txt").write_text("some words, and some more words. " * 20)
    (tmp_path / "b.txt").write_text("other words, 12 of them. " * 20)
    (tmp_path / "mix.toml").write_text(MIX)
    return tmp_path


@pytest.mark.slow
def test_train_writes_a_tokenizer_once_and_prints_its_compression(folder):
    figures = json.loads(printed("train", "mix.toml", "--vocab-size", 270, "--out", "new.json", "--json", cwd=folder))
    assert figures["vocab_size"] == 270
    assert figures["bytes_per_token"] > 1
    shown = json.loads(printed("inspect", "new.json", "--json", cwd=folder))
    assert shown == {"vocab_size": 270, "hash": figures["hash"]}
    again = rmkv("train", "mix.toml", "--vocab-size", 270, "--out", "new.json", cwd=folder)
    assert (again.returncode, again.stderr) == (
        2,
        b"error: new.json: already exists; remove it or choose another name\n",
    )


def test_a_full_disk_leaves_no_partial_tokenizer_and_is_one_line(folder):
    before = sorted(folder.iterdir())
    done = rmkv("train", "mix.toml", "--vocab-size", 270, "--out", "new.json", cwd=folder, limit=1_000)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("error: ")
    assert b"file too large" in done.stderr
    assert b"Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
def test_encode_then_decode_gives_back_the_bytes(folder):
    data = "né <eod>\r\n\t 12\0 😀".encode()
    (folder / "data.bin").write_bytes(data)
    ids = printed("encode", "t.json", cwd=folder, stdin=data)
    assert ids == printed("encode", "t.json", "--file", "data.bin", cwd=folder)
    assert min(map(int, ids.split())) >= 7
    assert printed("decode", "t.json", cwd=folder, stdin=ids) == data
    assert printed("decode", "t.json", 3, ids.split()[0].decode(), 2, cwd=folder) == b"<start>n<eod>"
    first_byte = ids.split()[1].decode()
    assert printed("decode", "t.json", first_byte, cwd=folder) == b"\xc3"


def test_a_closed_stdin_is_an_empty_text(folder):
    command = ["sh", "-c", '"$0" -m rmkv_cli tokenizer encode t.json --json <&-', sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert (json.loads(done.stdout), done.stderr) == ({"ids": []}, b"")


def test_inspect_shows_how_a_text_splits(folder):
    lines = printed("inspect", "t.json", "--text", "some é12", cwd=folder).decode().splitlines()
    assert lines[0].split() == ["vocab", "size", "270"]
    assert lines[-2].split() == ["bytes", "per", "token", "1.500"]
    assert lines[-1] == r"some| |\xc3|\xa9|1|2"
    figures = json.loads(printed("inspect", "t.json", "--file", "a.txt", "--json", cwd=folder))
    assert figures["bytes"] == 660
    assert figures["bytes_per_token"] == 660 / figures["tokens"]


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["encode", "none.json", "a"], b"", "none.json: no such file"),
        (["encode", "t.json", "--file", "none.txt"], b"", "none.txt: no such file"),
        (["encode", "t.json"], b"a\xff", "stdin: is not valid UTF-8 at byte 1"),
        (["encode", "t.json", b"a\xff"], b"", "character 2 of the text is a lone surrogate"),
        (["encode", "t.json", "a", "--file", "a.txt"], b"", "give the text either as an argument or with --file"),
        (["decode", "t.json", "9999"], b"", "9999 is not a token id of this tokenizer; its ids are 0 to 269"),
        (["decode", "t.json"], b"1 b", "stdin: 'b' is not a token id"),
        (["train", "mix.toml", "--vocab-size", "9", "--out", "x"], b"", "a vocabulary of 9 is too small"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, args, stdin, message):
    command = [sys.executable, "-m", "rmkv_cli", "tokenizer", *args]
    done = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, check=False)
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"error: {message}")
    assert (done.returncode, done.stdout) == (2, b"")
