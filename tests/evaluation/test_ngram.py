import math
from collections import Counter

import numpy as np
import pytest
from small_documents import make_documents
from trained_run import make_data

from rmkv_cli.data.documents import Documents
from rmkv_cli.evaluation import ngram
from rmkv_cli.evaluation.measure import sample
from rmkv_cli.evaluation.ngram import Baseline, NGram, measure_baseline, texts
from rmkv_cli.tokenizer import Special, Tokenizer, train_tokenizer


def by_loops(train, held_out, order=3):
    """The definition, one byte at a time, with tuples for contexts and None for the start mark."""
    counts, after = Counter(), {}
    for text in train:
        padded = [None] * order + list(text)
        for i in range(order, len(padded)):
            for length in range(order + 1):
                context = tuple(padded[i - length : i])
                counts[context, padded[i]] += 1
                after.setdefault(context, []).append(padded[i])

    def probability(context, byte):
        lower = probability(context[1:], byte) if context else 1 / 256
        followers = after.get(context)
        if not followers:
            return lower
        kinds = len(set(followers))
        return (counts[context, byte] + kinds * lower) / (len(followers) + kinds)

    bits = total = 0
    for text in held_out:
        padded = [None] * order + list(text)
        for i in range(order, len(padded)):
            bits -= math.log2(probability(tuple(padded[i - order : i]), padded[i]))
            total += 1
    return bits / total


TRAIN = [b"the cat sat on the mat", b"the dog sat on the log", b"", b"\x00\xff\xff", "dünn und groß".encode()]
HELD_OUT = [b"the cat on the log", b"", b"a", b"\xff\x00zzz"]


@pytest.mark.parametrize("order", [0, 1, 3])
def test_it_agrees_with_plain_loops(order):
    assert NGram(TRAIN, order).bits_per_byte(HELD_OUT) == pytest.approx(by_loops(TRAIN, HELD_OUT, order), rel=1e-12)


def test_counting_in_chunks_changes_nothing(monkeypatch):
    whole = NGram(TRAIN).bits_per_byte(HELD_OUT)
    monkeypatch.setattr(ngram, "CHUNK", 5)
    assert NGram(TRAIN).bits_per_byte(HELD_OUT) == whole


def test_a_worked_example():
    # Order 0 on b"aab": p(a) = (2 + 2/256) / (3 + 2), p(c) = (0 + 2/256) / 5.
    expected = -(math.log2((2 + 2 / 256) / 5) + math.log2((2 / 256) / 5)) / 2
    assert NGram([b"aab"], order=0).bits_per_byte([b"ac"]) == pytest.approx(expected)


def test_without_training_text_it_is_uniform():
    assert NGram([]).bits_per_byte([b"anything"]) == 8.0
    assert NGram([b"text"]).bits_per_byte([b""]) is None


def test_it_learns():
    """Bytes from a chain that depends on the last two bytes, whose true entropy is known: 1 bit a byte."""
    draws = np.random.default_rng(0).integers(0, 2, 1_000_000, dtype=np.uint8)
    text = (draws + 2 * np.roll(draws, 1) + 4 * np.roll(draws, 2)).tobytes()
    bits = NGram([text[:900_000]]).bits_per_byte([text[900_000:]])
    assert bits == pytest.approx(1.0, abs=1e-3)


def test_texts_are_the_bytes_of_documents_without_special_tokens():
    said = ["ünd so <think> 12", "", "plain"]
    tokenizer = train_tokenizer(iter(said), 280)
    ids = [[Special.START.id, *tokenizer.encode(text), Special.END.id] for text in said]
    documents = make_documents(ids, vocab_size=tokenizer.vocab_size)
    assert list(texts(documents, tokenizer)) == [text.encode() for text in said]


def test_noise_and_tasks_have_no_text():
    tokenizer = train_tokenizer(iter(["text"]), 280)
    documents = make_documents([[20, 30], [40]], sizes=[0, 1], vocab_size=tokenizer.vocab_size)
    assert list(texts(documents, tokenizer)) == [b"", tokenizer.token_bytes(40)]


def test_the_baseline_of_a_mix_counts_its_training_texts_and_predicts_the_held_out_ones(tmp_path, monkeypatch):
    data = make_data(tmp_path / "story")
    tokenizer = Tokenizer.load(data)
    training, held_out = Documents.open(data, "train"), Documents.open(data, "validation")
    counted = list(texts(training, tokenizer))
    expected = by_loops(counted, list(texts(held_out, tokenizer)))
    assert measure_baseline(data, tokenizer) == Baseline(3, pytest.approx(expected), sum(map(len, counted)))

    chosen, lengths = sample(held_out.lengths, held_out.sources, 50)
    read = [tokenizer.decode(held_out[i][1 : n + 1].tolist()).encode() for i, n in zip(chosen, lengths, strict=True)]
    assert measure_baseline(data, tokenizer, 50).bits_per_byte == pytest.approx(by_loops(counted, read))

    monkeypatch.setattr(ngram, "TRAINING_TOKENS", 100)
    assert measure_baseline(data, tokenizer).training_bytes < sum(map(len, counted))
