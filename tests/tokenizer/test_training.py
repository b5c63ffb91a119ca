"""Training a tokenizer."""

import pytest

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import train_tokenizer

TEXTS = ["the cat sat on the mat", "the bat and the rat", "that hat"] * 3


def test_the_same_texts_give_the_same_tokenizer():
    assert train_tokenizer(iter(TEXTS), 270).hash == train_tokenizer(iter(TEXTS), 270).hash
    assert train_tokenizer(iter(TEXTS), 270).hash != train_tokenizer(iter(TEXTS), 269).hash


def test_the_vocabulary_is_the_specials_the_bytes_and_then_merges():
    assert train_tokenizer(iter([]), 263).vocab_size == 263
    tokenizer = train_tokenizer(iter(TEXTS), 270)
    assert tokenizer.vocab_size == 270
    assert sorted(tokenizer.token_bytes(i) for i in range(7, 263)) == [bytes([b]) for b in range(256)]
    assert b"at" in [tokenizer.token_bytes(i) for i in range(263, 270)]


def test_too_short_texts_give_a_smaller_vocabulary():
    assert train_tokenizer(iter(["ab ab"]), 400).vocab_size < 270


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"a vocabulary of 262 is too small: .* make 263"):
        train_tokenizer(iter(TEXTS), 262)
    with pytest.raises(UserError, match=r"a vocabulary of 10000000000000 is too large: 16,777,216 is the most"):
        train_tokenizer(iter(TEXTS), 10**13)


def test_an_error_of_the_texts_comes_through():
    def texts():
        yield "fine"
        raise UserError("line 2: broken")

    with pytest.raises(UserError, match="line 2: broken"):
        train_tokenizer(texts(), 300)
