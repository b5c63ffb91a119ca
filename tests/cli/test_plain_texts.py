"""Commands that take a mix also take a folder or file of texts without a mix.toml."""

import json

import pytest
from small_run import error_of

from rmkv_cli.tokenizer import train_tokenizer


@pytest.fixture
def books(tmp_path, monkeypatch):
    """A folder with several kinds of texts and other files; the tests run in its parent folder."""
    monkeypatch.chdir(tmp_path)
    train_tokenizer(iter(["some words, and some more"]), 280).save(tmp_path / "tokenizer.json")
    files = {
        "a.txt": "words of a",
        "b.txt": "words of b",
        "old [1]/c.md": "words of c",
        "rows.jsonl": '{"text": "words of a row"}\n',
        "README": "words of a file without a suffix",
        "data.json": "{}",
        ".hidden": "no words",
        ".git/config.txt": "no words",
    }
    for name, text in files.items():
        path = tmp_path / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "books" / "photo.png").write_bytes(b"\x89PNG\0\0")
    return tmp_path / "books"


def test_a_folder_is_a_mix_of_all_its_texts(books, shown):
    written = shown("data", "mix", "books", "--workers", 1, "--json")
    (source,) = json.loads(written.out)["sources"]
    assert (source["name"], source["documents"], source["skipped"]) == ("books", 5, 1)
    first, *_ = written.err.splitlines()
    assert first == (
        "books: using these files as a mix of one source: 2 .txt, 1 without a suffix, 1 .jsonl, 1 .md, 1 .png; "
        "skipping 1 of JSON"
    )


def test_a_file_is_a_mix_of_one_document(books, shown):
    written = shown("data", "mix", "books/a.txt", "--workers", 1, "--json")
    (source,) = json.loads(written.out)["sources"]
    assert (source["name"], source["documents"], source["bytes"]) == ("a.txt", 1, 10)
    assert written.err.startswith("books/a.txt: using this file as a mix of one source\n")


def test_tokens_set_the_length_of_the_mix(books, shown):
    written = shown("data", "mix", "books", "--tokens", "2k", "--workers", 1, "--json")
    assert 2000 <= json.loads(written.out)["sources"][0]["tokens"] < 2100


@pytest.mark.parametrize("place", ["books", "books/a.txt"])
def test_a_tokenizer_is_trained_on_a_folder_or_a_file(books, shown, place):
    written = shown("tokenizer", "train", place, "--vocab-size", 270, "--out", "new.json", "--json")
    assert json.loads(written.out)["bytes"] == (76 if place == "books" else 10)


def test_a_folder_with_a_mix_toml_is_that_mix(books, printed):
    (books / "mix.toml").write_text('[[sources]]\nkind="files"\nname="mine"\nweight=1\nfiles=["a.txt"]')
    (source,) = json.loads(printed("data", "mix", "books", "--workers", 1, "--json"))["sources"]
    assert source["name"] == "mine"


def test_a_path_that_cannot_be_a_mix_is_reported(books, monkeypatch, capsys, shown):
    def error(*arguments):
        return error_of(monkeypatch, capsys, *arguments)

    (books.parent / "empty").mkdir()
    assert error("data", "mix", "empty") == "error: empty: has no text files"
    assert "mix 'absent': no such mix" in error("data", "mix", "absent")
    shown("data", "mix", "books", "--workers", 1)
    assert error("data", "mix", "data", "--out", "again") == (
        "error: data: is already a prepared mix; train on it with `rmkv train --data data`"
    )


def test_training_on_a_folder_of_texts_says_what_to_run(books, monkeypatch, capsys):
    assert error_of(monkeypatch, capsys, "train", "--preset", "tiny", "--data", "books") == (
        f"error: {books}: is not a mix (it has no manifest.json); "
        f"`rmkv data mix {books} --out NEW` makes one from its texts"
    )
