"""Tasks as sources of a mix."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

from rmkv_cli.config import MixConfig
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.mix import prepare
from rmkv_cli.data.survey import SAMPLE_CHARACTERS, survey_folder, survey_mix
from rmkv_cli.errors import UserError

RECALL = {"kind": "recall", "keys": 8, "values": 8, "noise": 8, "segments": [0, 2], "segment_length": 10}


@pytest.fixture
def make(tmp_path, tokenizer):
    """Prepares a mix of these sources in tmp_path/NAME and returns its manifest."""

    def prepare_mix(*sources, name="out", workers=1, **rest):
        mix = MixConfig(sources=sources, **{"tokens": 20_000, "validation": 0.1} | rest)
        return prepare(mix, tmp_path, tokenizer, tmp_path / name, workers)

    return prepare_mix


@pytest.fixture
def book(write_jsonl):
    """A source of 60 numbered texts."""
    file = write_jsonl("book.jsonl", [f"Text {i} " + "of words and more words " * (i % 5 + 1) for i in range(60)])
    return {"kind": "files", "name": "book", "weight": 1, "files": [file]}


def test_documents_ask_for_what_they_contain_and_only_the_answers_count(tmp_path, make, tokenizer):
    manifest = make(RECALL | {"pairs": [1, 4]})
    shapes = set()
    for split in ("train", "validation"):
        documents = Documents.open(tmp_path / "out", split)
        for i, ids in enumerate(documents):
            assert ids[0] == tokenizer.eod
            marker = ids.tolist().index(7 + 24)
            asked = ids[marker + 1 :].reshape(-1, 2)
            output = ids[1 : 1 + asked.size].reshape(-1, 2)
            assert sorted(asked.tolist()) == sorted(output.tolist())
            counted = documents.counted(i)
            assert np.flatnonzero(counted).tolist() == list(range(marker + 1, len(ids), 2))  # where the keys stand
            assert documents.counts[i] == counted.sum() == len(asked)
            shapes.add((len(asked), marker - 1 - asked.size))
        assert not documents.sizes.any()
    assert shapes == {(1, 0), (1, 20), (4, 0), (4, 20)}
    train, held = manifest.splits["train"].documents, manifest.splits["validation"].documents
    assert 0.07 < held / (held + train) < 0.13
    assert manifest.sources[0].epochs == 1


def test_noise_is_the_training_text_of_its_source_from_the_start_and_repeated(tmp_path, make, tokenizer, book):
    tasks = RECALL | {"text": "book", "segments": [3]}, RECALL | {"name": "other", "text": "book"}
    make(book | {"weight": 2}, *tasks, validation=0.3)
    train, held = (Documents.open(tmp_path / "out", split) for split in ("train", "validation"))
    documents = [train[int(i)][1:].tolist() for i in np.flatnonzero(train.sources == 0)]
    text = [token for ids in documents for token in ids]
    once = sum(map(len, documents[: documents.index(documents[0], 1)]))

    def noise(source, length):
        found = (d[int(i)] for d in (train, held) for i in np.flatnonzero(d.sources == source))
        return sorted(ids[3 : 3 + length].tolist() for ids in found if len(ids) == 6 + length)

    for source, length in ((1, 30), (2, 20)):  # each of them reads for itself
        parts = noise(source, length)
        assert 2 * once < len(parts) * length < len(text)
        assert parts == sorted(text[i : i + length] for i in range(0, len(parts) * length, length))
    assert train[int(np.flatnonzero(train.sources == 1)[0])][1:3].min() >= tokenizer.vocab_size - 17


def test_a_noise_text_without_training_documents_is_refused(tmp_path, make, write_jsonl, book):
    empty = book | {"name": "empty", "files": [write_jsonl("empty.jsonl", [""] * 40)]}
    with pytest.raises(UserError, match="no training text for a task's noise"):
        make(RECALL | {"text": "empty", "segments": [1]}, empty)
    assert not (tmp_path / "out").exists()


def test_a_bad_record_of_the_text_stops_the_mix_or_is_left_out(tmp_path, make, book):
    file = tmp_path / "book.jsonl"
    file.write_text("broken\n" + file.read_text())
    task = RECALL | {"text": "book", "segments": [1]}
    with pytest.raises(UserError, match=r"book\.jsonl:1: is not valid JSON.* \(source 'book'"):
        make(task, book)
    assert [source.skipped for source in make(task, book, on_error="skip").sources] == [0, 1]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, make, book, monkeypatch):
    monkeypatch.setattr("rmkv_cli.data.encoding.GROUP_DOCUMENTS", 5)
    hashes = set()
    for workers in (1, 2):
        needle = {"kind": "needle", "segments": [2], "needles": 2, "text": "book"}
        make(book, RECALL, {"kind": "facts", "text": "book"}, needle, name=str(workers), workers=workers)
        files = sorted((tmp_path / str(workers)).iterdir())
        hashes.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
    assert len(hashes) == 1


def test_text_beside_tasks_counts_in_full(tmp_path, make, book):
    make(book, {"kind": "copy", "length": [5], "segments": [0]})
    documents = Documents.open(tmp_path / "out", "train")
    for i in range(len(documents)):
        assert (documents.counted(i) is None) == (documents.sources[i] == 0)
    assert (documents.counts == np.where(documents.sources == 0, documents.lengths, 5)).all()


def test_a_mix_that_was_made_before_there_were_tasks_can_be_read(tmp_path, make, book):
    make(book)
    now = [ids.tolist() for ids in Documents.open(tmp_path / "out", "train")]
    shard = tmp_path / "out" / "train-00000.arrow"
    old = pa.ipc.open_file(shard.read_bytes()).read_all().drop_columns("answers")
    shard.unlink()
    with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_file(file, old.schema) as writer:
        writer.write_table(old)
    manifest = tmp_path / "out" / "manifest.json"
    plain = json.loads(manifest.read_text())
    for split in plain["splits"].values():
        del split["sha256"]
    manifest.write_text(json.dumps(plain))
    then = Documents.open(tmp_path / "out", "train")
    assert [ids.tolist() for ids in then] == now
    assert then.counted(0) is None
    assert then.counts.tolist() == then.lengths.tolist()


def test_a_vocabulary_that_is_too_small_is_reported_before_anything_is_written(tmp_path, make):
    with pytest.raises(UserError, match=r"task 'recall': .* needs 1024 ids, but the tokenizer has 297; lower keys"):
        make(RECALL | {"keys": 1000})
    assert not (tmp_path / "out").exists()


def test_inspecting_shows_the_question_too(tmp_path, make):
    make({"kind": "needle", "segments": [8]})
    (survey,) = survey_folder(tmp_path / "out", 2)
    for pieces in survey.samples:
        text = "".join(pieces)
        assert text.startswith("<eod>")
        assert "… " in text
        assert len(text) <= SAMPLE_CHARACTERS + 3
        assert " for " in text[-40:]
    mix = MixConfig(tokens=9, sources=[{"kind": "needle"}])
    assert survey_mix(mix, tmp_path, 2, 9)[0].documents == 0


def test_a_source_without_weight_is_only_noise(tmp_path, make, book, tokenizer):
    needle = {"kind": "needle", "text": "book", "segments": [1]}
    manifest = make(book | {"weight": 0}, needle, tokens=2000)
    assert [source.documents > 0 for source in manifest.sources] == [False, True]
    document = Documents.open(tmp_path / "out", "train")[0].tolist()
    assert "of words and more words" in tokenizer.decode(document)


def test_a_source_without_weight_that_no_task_uses_is_refused(book):
    with pytest.raises(ValueError, match="'book': weight = 0, and no phase or task uses it"):
        MixConfig(sources=[book | {"weight": 0}, RECALL], tokens=2000)
