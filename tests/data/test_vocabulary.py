"""Train a tokenizer on a mix."""

import json

import pytest

from rmkv_cli.config import MixConfig
from rmkv_cli.data.vocabulary import _by_bytes, train_on_mix
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import train_tokenizer


def test_texts_are_taken_in_proportion_by_bytes_and_an_exhausted_source_is_dropped(tmp_path, write_jsonl, mix_of):
    sources = {
        "a": (3, write_jsonl("a.jsonl", ["a" * 10] * 60)),
        "b": (1, write_jsonl("b.jsonl", ["b" * 30] * 10)),
        "noise": (9, 100),
    }
    documents = list(_by_bytes(mix_of(sources, tokens=1), tmp_path))
    first = [d.document.source for d in documents[:40]]
    assert (first.count("a"), first.count("b")) == (36, 4)  # 360 bytes and 120
    assert len(documents) == 70


def test_training_stops_at_max_bytes_and_excludes_held_out_documents(tmp_path, write_jsonl, mix_of, capsys):
    texts = [f"number {i} " * 10 for i in range(300)]
    mix = mix_of({"a": (1, write_jsonl("a.jsonl", texts))}, validation=0.5)
    trained = train_on_mix(mix, tmp_path, 300, 4_000)
    assert 4_000 <= trained.bytes < 4_200
    assert trained.held_out
    assert trained.bytes_per_token > 1
    assert capsys.readouterr().err.splitlines() == ["Reading text: done", "Merging into 300 tokens"]
    everything = train_on_mix(mix, tmp_path, 300, None)
    assert 0.4 < everything.bytes / sum(map(len, texts)) < 0.6


def test_without_held_out_documents_the_training_text_is_measured(tmp_path, write_jsonl, mix_of):
    texts = ["some words", "and 12 more"]
    trained = train_on_mix(mix_of({"a": (1, write_jsonl("a.jsonl", texts))}, validation=0), tmp_path, 270, None)
    assert not trained.held_out
    assert trained.tokenizer.hash == train_tokenizer(iter(texts), 270).hash
    assert trained.bytes_per_token == 21 / sum(len(trained.tokenizer.encode(text)) for text in texts)


def test_special_tokens_of_prompts_are_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "response": "<think>q</think>r"}))
    source = {"kind": "files", "name": "a", "weight": 1, "files": ["a.jsonl"], "format": "prompt_response"}
    mix = MixConfig(sources=[source], validation=0)
    assert train_on_mix(mix, tmp_path, 270, None).bytes == 3


def test_a_mix_without_text_is_refused(tmp_path, mix_of):
    with pytest.raises(UserError, match="contain no text"):
        train_on_mix(mix_of({"noise": (1, 10)}, tokens=5), tmp_path, 270, None)
