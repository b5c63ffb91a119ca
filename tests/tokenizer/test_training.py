"""Training a tokenizer."""

import json
import random
import signal
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import pre_tokenizers, trainers

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Special, train_tokenizer

MIX = """
[[sources]]
kind = "files"
name = "text"
weight = 1
files = ["text.txt"]
"""
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
    with pytest.raises(UserError, match=r"a vocabulary of 10000000000000 is too large: the maximum is 16,777,216"):
        train_tokenizer(iter(TEXTS), 10**13)


def test_an_error_of_the_texts_comes_through():
    def texts():
        yield "fine"
        raise UserError("line 2: broken")

    with pytest.raises(UserError, match="line 2: broken"):
        train_tokenizer(texts(), 300)


def test_a_word_of_any_length_is_trained_on_and_stays_one_word_for_the_tokenizer(capsys):
    word = "".join(random.Random(0).choices("abcdefgh", k=200_000))  # uncut, it would take minutes
    tokenizer = train_tokenizer(iter([f"the {word} cat", word]), 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(word)) == word
    note = "note: training cuts words of more than 1024 bytes (the longest has 200,000)"
    assert capsys.readouterr().err.count(note) == 1
    plain = json.loads(train_tokenizer(iter(TEXTS), 263).to_json())
    assert json.loads(tokenizer.to_json())["pre_tokenizer"] == plain["pre_tokenizer"]
    assert "cut" not in capsys.readouterr().err


def test_words_that_training_sees_whole_give_what_the_library_itself_makes_of_them():
    words = ["ab" * 512, "漢字" * 170, "_" * 1024, " " * 900, "the cat"]
    library = tokenizers.Tokenizer.from_str(train_tokenizer(iter([]), 263).to_json())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        iter(words),
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(map(str, Special)), initial_alphabet=alphabet, show_progress=False
        ),
    )
    assert train_tokenizer(iter(words), 300).to_json() == library.to_str()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_merging_which_would_take_minutes(tmp_path, sent):
    characters = random.Random(0).choices([chr(code) for code in range(0x4E00, 0x6E00)], k=2_000_000)
    (tmp_path / "text.txt").write_text("".join(characters))
    (tmp_path / "mix.toml").write_text(MIX)
    command = [sys.executable, "-m", "rmkv_cli", "tokenizer", "train", tmp_path / "mix.toml"]
    command += ["--vocab-size", str(2**23), "--out", tmp_path / "tokenizer.json"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            assert any("cuts words" in line for line in lines)
            process.send_signal(sent)
            assert process.wait() == {signal.SIGINT: 130, signal.SIGTERM: 143}[sent]
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "mix.toml"}
