import json

import pytest
from small_run import TEXT, error_of, save_small_model

from rmkv_cli.config import MemoryConfig


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    save_small_model(folder / "model")
    (folder / "book.txt").write_text(TEXT * 20)
    return folder


def test_tables_and_a_picture(book, printed):
    file = ["--file", book / "book.txt", "--max-tokens", 200, "--picture", book / "memory.png"]
    tables = printed("inspect", "memory", "--model", book / "model", *file)
    for words in ("half-life", "effective", "segments in all"):
        assert words in tables
    assert "its pooling" not in tables
    assert (book / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_requested_slots_follow_the_summary(book, printed):
    file = ["--file", book / "book.txt", "--max-tokens", 200]
    summary = printed("inspect", "memory", "--model", book / "model", *file)
    tables = printed("inspect", "memory", "--model", book / "model", *file, "--slots")
    assert tables.startswith(summary)
    for words in ("' the'", "its pooling"):
        assert words in tables.removeprefix(summary)


def test_json_of_a_model_without_slots_and_its_picture(book, printed):
    save_small_model(book / "stores", memory=MemoryConfig(slots=0))
    file = ["--file", book / "book.txt", "--max-tokens", 100, "--picture", book / "stores.png"]
    figures = json.loads(printed("inspect", "memory", "--model", book / "stores", *file, "--json"))
    assert figures["tokens"] == 100 - 8
    assert [layer["slots"] for layer in figures["layers"]] == [[], []]
    assert len(figures["layers"][0]["store"]["half_life"]) == 2
    assert (book / "stores.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_memory_gets_an_answer(book, printed):
    save_small_model(book / "none", memory=MemoryConfig(slots=0, store=0))
    file = ["--file", book / "book.txt", "--picture", book / "none.png"]
    assert "+0.0000" in printed("inspect", "memory", "--model", book / "none", *file)
    assert (book / "none.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(book, monkeypatch, capsys):
    def error(file, *rest, model=book / "model"):
        return error_of(monkeypatch, capsys, "inspect", "memory", "--model", model, "--file", file, *rest)

    (book / "short.txt").write_text("cat")
    assert "more than a segment (8 tokens)" in error(book / "short.txt")
    assert "no such file" in error(book / "absent.txt")
    assert "max_tokens: should be 1 or more" in error(book / "book.txt", "--max-tokens", "0")
    monkeypatch.setattr("rmkv_cli.evaluation.pictures.find_spec", lambda name: None)
    assert "pip install -c constraints.txt -e '.[plot]'" in error(book / "book.txt", "--picture", book / "no.png")
