"""The parts of a text have the same tokens as the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmkv_cli.tokenizer import Tokenizer, in_parts, train_tokenizer

WORDS = "The quick brown fox's naïve café, 2024-01-02 <eod> def f(x):\r\n\treturn x ** 2  我们走吧。你好，世界！ '90s "
TOKENIZER = train_tokenizer(iter([WORDS * 3, WORDS.upper()]), 400)
# Characters of each kind in the tokenizer's pattern, so that all pairs of kinds occur.
KINDS = st.text(
    st.sampled_from("aZé我ば가 \n\r\t\u00a0\u3000\u2028\x1c\x850٣½.,'!?。，、「-_\0\u200b\u0301😀st"), max_size=60
)
texts = st.lists(st.one_of(st.text(), KINDS, st.sampled_from([WORDS, "'ll", " 're", "  \n "]))).map("".join)


@settings(max_examples=1000, deadline=None)
@given(texts, st.integers(1, 20))
def test_the_tokens_of_the_parts_are_those_of_the_whole_text(text, length):
    parts = list(in_parts([text], length))
    assert "".join(parts) == text
    assert [i for part in parts for i in TOKENIZER.encode(part)] == TOKENIZER.encode(text)
    assert all(len(part) >= length for part in parts[:-1])


@settings(max_examples=300, deadline=None)
@given(st.lists(texts), st.integers(1, 20))
def test_parts_do_not_depend_on_how_the_text_comes(pieces, length):
    assert list(in_parts(pieces, length)) == list(in_parts(["".join(pieces)], length))


@pytest.mark.parametrize("text", [WORDS * 500, "我们走吧。你好，世界！" * 4000, "QmFzZTY0IGhhcyBkaWdpdHM0Cg" * 2000])
def test_ordinary_text_has_such_places_everywhere(text):
    assert max(map(len, in_parts([text], 1000))) < 1100


def test_where_there_is_no_such_place_a_part_grows():
    assert list(in_parts(["a" * 500, "b" * 500, " c"], 10)) == ["a" * 500 + "b" * 500, " c"]


def test_where_there_is_no_place_a_part_has_its_longest_length():
    text = "a" * 95 + " b" + "c" * 25
    assert list(in_parts([text], 10, 30)) == ["a" * 30, "a" * 30, "a" * 30, "a" * 5 + " b" + "c" * 23, "cc"]
    for pieces in (list(text), [text[:40], text[40:]]):
        assert list(in_parts(pieces, 10, 30)) == list(in_parts([text], 10, 30))


def test_a_long_text_is_encoded_in_parts_unnoticed(monkeypatch):
    text = "".join(f"{WORDS}{i}" for i in range(300))
    sizes = []

    class Library:
        def __getattr__(self, name):
            return getattr(TOKENIZER._library, name)

        def encode_batch_fast(self, texts, **rest):
            sizes.append(sum(map(len, texts)))
            return TOKENIZER._library.encode_batch_fast(texts, **rest)

    tokenizer = Tokenizer.from_json(TOKENIZER.to_json())
    monkeypatch.setattr("rmkv_cli.tokenizer.tokenizer.PART", 100)
    monkeypatch.setattr("rmkv_cli.tokenizer.tokenizer.BATCH", 500)
    monkeypatch.setattr(tokenizer, "_libraries", [Library()] * 3)
    short = ["some", "", "words"]
    assert tokenizer.encode_documents([[text], short, [text, "x"]]) == [
        [2, *TOKENIZER.encode(text)],
        [2, *(i for word in short for i in TOKENIZER.encode(word))],
        [2, *TOKENIZER.encode(text), *TOKENIZER.encode("x")],
    ]
    assert max(sizes) < 800
