"""Texts are streamed: the tokens are those of the whole text, and little of it is in memory."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmkv_cli.errors import UserError
from rmkv_cli.generation import text_pieces, texts
from rmkv_cli.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(iter(["the cat's 12 mats, \n\n and  the dog's 3 logs.\n\t a" * 20]), 320)


def pieces(data, **rest):
    return list(text_pieces(io.BytesIO(data), "a.txt", **rest))


@given(st.lists(st.sampled_from(["the", "cat's", "12", " ", "  ", "\n", "\t", "\r\n", "é€😀", "字", "!?", "\u00a0"])))
def test_the_tokens_are_the_whole_texts(words):
    text = "".join(words).replace("\r\n", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "READ", 3)
        cut = pieces("".join(words).encode())
    assert "".join(cut) == text
    assert [i for piece in cut for i in TOKENIZER.encode(piece)] == TOKENIZER.encode(text)


def test_a_long_text_comes_in_small_pieces_as_it_is_read(monkeypatch):
    read = []
    data = b"Some words in a line.\n" * 10_000
    for piece in text_pieces(io.BytesIO(data), "a.txt", read.append):
        assert 0 < len(piece) <= 2 * texts.READ
    assert sum(read) == len(data)


def test_a_text_without_words_is_divided_too(monkeypatch):
    monkeypatch.setattr(texts, "LONGEST", 20_000)
    cut = pieces("é".encode() * 100_000)
    assert "".join(cut) == "é" * 100_000
    assert max(map(len, cut)) <= 20_000 + texts.READ


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8192])
def test_a_byte_order_mark_is_not_text_and_line_ends_are_newlines(monkeypatch, size):
    text = b"a\r\nb\rc\n\r\r\n"
    assert "".join(pieces(b"\xef\xbb\xbf" + text)) == "a\nb\nc\n\n\n"
    monkeypatch.setattr(texts, "READ", size)
    assert "".join(pieces(text)) == "a\nb\nc\n\n\n"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (
            "fine".encode("utf-16"),
            "is UTF-16, where UTF-8 is expected; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
        ),
        ("fine".encode("utf-16-be"), "is UTF-16, where UTF-8 is expected"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-lfs pointer, not the file itself"),
    ],
)
def test_a_wrong_encoding_or_a_missing_file_is_reported(data, what):
    with pytest.raises(UserError, match=f"^a.txt: {what}"):
        pieces(data)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"text \xff", "byte 0xff at offset 5"),
        (b"a " * 8192 + "€".encode()[:2], "byte 0xe2 at offset 16384"),
        (b"a" * 8191 + b"\xe2\x82a", "byte 0xe2 at offset 8191"),
    ],
)
def test_invalid_utf8_is_reported_with_its_location(data, place):
    with pytest.raises(UserError, match=f"a.txt: is not valid UTF-8: {place}"):
        pieces(data)
