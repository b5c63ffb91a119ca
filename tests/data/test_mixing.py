"""Mixing: the ratio by tokens, the split, determinism, and the handling of bad sources."""

import hashlib
import json

import numpy as np
import pytest

from rmkv_cli.data import feed
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.mix import prepare
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256
from rmkv_cli.tokenizer import Tokenizer


def words(name, count, length=9):
    return [f"{name} {i} " + "word " * (i * 7 % length) for i in range(count)]


def whole(folder, split="train"):
    documents = Documents.open(folder, split)
    return [(int(documents.sources[i]), documents[i].tolist()) for i in range(len(documents))]


def test_the_ratio_never_drifts_by_more_than_a_document(tmp_path, tokenizer, write_jsonl, mix_of):
    sources = {n: (w, write_jsonl(f"{n}.jsonl", words(n, 300))) for n, w in (("a", 5), ("b", 1), ("c", 2.5))}
    manifest = prepare(mix_of(sources, validation=0.2), tmp_path, tokenizer, tmp_path / "out", 1)
    documents = Documents.open(tmp_path / "out", "train")
    given = np.zeros((len(documents) + 1, 3))
    given[1:][np.arange(len(documents)), documents.sources] = documents.lengths
    shares = given.cumsum(0) / np.array([5, 1, 2.5])
    assert (shares.max(1) - shares.min(1) <= documents.lengths.max()).all()
    assert [s.wanted for s in manifest.sources] == pytest.approx([5 / 8.5, 1 / 8.5, 2.5 / 8.5])
    tokens = given.sum(0)
    assert [s.achieved for s in manifest.sources] == (tokens / tokens.sum()).tolist()
    assert [s.tokens for s in manifest.sources] == tokens.tolist()
    read_to_its_end = [s.name for s in manifest.sources if s.documents > 200]
    assert read_to_its_end == ["a"]  # the first to run dry ends the mix
    assert manifest.ended_by == "a"


def test_with_tokens_exhausted_sources_are_repeated_and_their_epochs_counted(tmp_path, tokenizer, write_jsonl, mix_of):
    sources = {"a": (1, write_jsonl("a.jsonl", words("a", 10))), "b": (1, write_jsonl("b.jsonl", words("b", 400)))}
    mix = mix_of(sources, tokens=3000, validation=0.3, seed=1)
    manifest = prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    a, b = manifest.sources
    assert (a.epochs > 2, b.epochs) == (True, 1)
    longest = Documents.open(tmp_path / "out", "train").lengths.max()
    assert 3000 <= manifest.splits["train"].tokens < 3000 + longest
    train, held = whole(tmp_path / "out"), whole(tmp_path / "out", "validation")
    texts = [tokenizer.decode(ids[1:]) for source, ids in train if source == 0]
    once = sorted(set(texts))
    readings = [texts[i : i + len(once)] for i in range(0, len(texts) - len(once), len(once))]
    assert all(sorted(reading) == once for reading in readings)
    assert readings[0] != readings[1]  # each in an order of its own
    held_texts = [tokenizer.decode(ids[1:]) for source, ids in held if source == 0]
    assert sorted(once + held_texts) == sorted(words("a", 10))  # each held-out document once, and never trained on


def test_the_text_and_the_seed_determine_the_split_of_a_document(tmp_path, tokenizer, write_jsonl, mix_of):
    texts = words("a", 1000)
    write_jsonl("a.jsonl", texts)
    write_jsonl("b.jsonl", texts[::-1])

    def held(file, seed, share=0.2):
        out = tmp_path / f"{file}-{seed}-{share}"
        prepare(mix_of({"it": (1, file)}, validation=share, seed=seed), tmp_path, tokenizer, out, 1)
        return {tokenizer.decode(ids) for _, ids in whole(out, "validation")}

    first = held("a.jsonl", 0)
    assert first == held("b.jsonl", 0)
    assert first != held("a.jsonl", 1)
    assert first < held("a.jsonl", 0, 0.4)
    assert 150 < len(first) < 250


@pytest.mark.parametrize("tokens", [None, 30_000])
def test_the_result_does_not_depend_on_the_number_of_workers(
    tmp_path, tokenizer, write_jsonl, mix_of, monkeypatch, tokens
):
    monkeypatch.setattr("rmkv_cli.data.encoding.GROUP_DOCUMENTS", 5)
    file = tmp_path / write_jsonl("a.jsonl", words("a", 300))
    file.write_text(file.read_text() + "broken\n" * 3)
    sources = {"a": (2, "a.jsonl"), "b": (1, write_jsonl("b.jsonl", words("b", 200)))}
    if tokens:
        sources["noise"] = (1, 20)
    for workers in (1, 3):
        mix = mix_of(sources, tokens=tokens, validation=0.1, on_error="skip")
        prepare(mix, tmp_path, tokenizer, tmp_path / f"{workers}", workers)
    one, three = (
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / f"{n}").iterdir()}
        for n in (1, 3)
    )
    assert one == three
    assert {"train-00000.arrow", "validation-00000.arrow", "manifest.json", "tokenizer.json"} == set(one)


def test_noise_is_uniform_in_both_splits_and_has_no_bytes(tmp_path, tokenizer, mix_of):
    manifest = prepare(
        mix_of({"noise": (1, 4)}, tokens=60_000, validation=0.3), tmp_path, tokenizer, tmp_path / "out", 1
    )
    for split in ("train", "validation"):
        targets = np.concatenate([np.append(ids[1:], 2) for _, ids in whole(tmp_path / "out", split)])
        values, counts = np.unique(targets, return_counts=True)
        assert values.tolist() == [2, 7, 8, 9]
        assert abs(counts / len(targets) - 0.25).max() < 0.015
    assert manifest.splits["train"].bytes == 0
    held = manifest.splits["validation"].documents
    assert 0.27 < held / (held + manifest.splits["train"].documents) < 0.33


def test_noise_needs_a_vocabulary_that_fits_it(tmp_path, tokenizer, mix_of):
    most = tokenizer.vocab_size - 6
    prepare(mix_of({"noise": (1, most)}, tokens=10), tmp_path, tokenizer, tmp_path / "out", 1)
    with pytest.raises(UserError, match=f"source 'noise': vocab = {most + 1} does not fit .* at most {most}"):
        prepare(mix_of({"noise": (1, most + 1)}, tokens=10), tmp_path, tokenizer, tmp_path / "no", 1)


def test_bad_records_stop_the_mix_or_are_counted_by_source(tmp_path, tokenizer, write_jsonl, mix_of):
    sources = {n: (1, write_jsonl(f"{n}.jsonl", words(n, 30))) for n in "ab"}
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    lines[3:3] = ["{", '{"text": 3}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"^{tmp_path / 'b.jsonl'}:4: is not valid JSON"):
        prepare(mix_of(sources), tmp_path, tokenizer, tmp_path / "out", 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    mix = mix_of(sources, on_error="skip", tokens=5_000)  # b is read several times, its faults counted once
    a, b = prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1).sources
    assert (a.skipped, a.first_error, b.skipped) == (0, None, 2)
    assert b.first_error.startswith(f"{tmp_path / 'b.jsonl'}:4: is not valid JSON")
    assert b.epochs > 1


@pytest.mark.parametrize("tokens", [None, 100])
def test_a_source_without_training_documents_ends_the_mix(tmp_path, tokenizer, write_jsonl, mix_of, tokens):
    (tmp_path / "a.jsonl").write_text("bad\n")
    sources = {"b": (1, write_jsonl("b.jsonl", words("b", 30))), "a": (1, "a.jsonl")}
    with pytest.raises(UserError, match=r"source 'a': has no document for training; 1 .*a\.jsonl:1: is not valid"):
        prepare(mix_of(sources, tokens=tokens, on_error="skip"), tmp_path, tokenizer, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_never_written_to(tmp_path, tokenizer, write_jsonl, mix_of):
    mix = mix_of({"a": (1, write_jsonl("a.jsonl", words("a", 30)))})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: already exists"):
        prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)


def test_the_manifest_is_complete_and_the_tokenizer_is_beside_it(tmp_path, tokenizer, write_jsonl, mix_of):
    mix = mix_of({"a": (1, write_jsonl("a.jsonl", words("a", 50)))}, validation=0.2, seed=4)
    manifest = prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    assert Manifest.load(tmp_path / "out") == manifest
    plain = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert plain["mix"] == mix.model_dump()
    assert (plain["format"], plain["seed"], plain["eod"]) == (3, 4, 2)
    assert plain["tokenizer_hash"] == tokenizer.hash == Tokenizer.load(tmp_path / "out").hash
    for name, split in plain["splits"].items():
        ids = [ids for _, ids in whole(tmp_path / "out", name)]
        size = sum(len(tokenizer.decode(document[1:]).encode()) for document in ids)
        counts = {"documents": len(ids), "tokens": sum(map(len, ids)), "bytes": size}
        shard = f"{name}-00000.arrow"
        assert split == counts | {"shards": [shard], "sha256": [sha256(tmp_path / "out" / shard)]}


def test_large_mixes_are_rolled_into_several_shards(tmp_path, tokenizer, write_jsonl, mix_of, monkeypatch):
    mix = mix_of({"a": (1, write_jsonl("a.jsonl", words("a", 200)))}, validation=0)
    prepare(mix, tmp_path, tokenizer, tmp_path / "one", 1)
    monkeypatch.setattr("rmkv_cli.data.shards.BATCH_TOKENS", 100)
    monkeypatch.setattr("rmkv_cli.data.shards.SHARD_BYTES", 2_000)
    manifest = prepare(mix, tmp_path, tokenizer, tmp_path / "many", 1)
    assert len(manifest.splits["train"].shards) > 3
    assert whole(tmp_path / "many") == whole(tmp_path / "one")


def test_read_ahead_is_bounded(tmp_path, tokenizer, write_jsonl, mix_of, monkeypatch):
    monkeypatch.setattr("rmkv_cli.data.encoding.GROUP_DOCUMENTS", 5)
    read = []
    read_source = feed.read_source

    def counting(source, *rest):
        for item in read_source(source, *rest):
            read.append(source.name)
            yield item

    monkeypatch.setattr(feed, "read_source", counting)
    sources = {"few": (1, write_jsonl("a.jsonl", words("a", 5))), "many": (1, write_jsonl("b.jsonl", words("b", 900)))}
    prepare(mix_of(sources, validation=0), tmp_path, tokenizer, tmp_path / "out", 1)
    assert read.count("many") < 40
