"""Random access to documents, from a prepared mix and directly from files."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pytest

from rmkv_cli.data.documents import Documents
from rmkv_cli.data.mix import prepare
from rmkv_cli.data.shards import BatchBuilder
from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer import Special, train_tokenizer

TEXTS = [f"text {i} " * (i + 1) for i in range(40)]


@pytest.fixture
def folder(tmp_path, tokenizer, write_jsonl, mix_of):
    mix = mix_of({"a": (1, write_jsonl("a.jsonl", TEXTS))}, validation=0)
    prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    return tmp_path / "out"


def test_documents_come_back_by_number_as_views_of_the_mapped_file(folder, tokenizer):
    documents = Documents.open(folder, "train")
    assert len(documents) == len(TEXTS)
    shown = [documents[i].tolist() for i in range(len(TEXTS))]
    assert sorted(shown) == sorted(tokenizer.encode_document([text]) for text in TEXTS)
    assert documents.lengths.tolist() == [len(documents[i]) for i in range(len(TEXTS))]
    assert documents.sizes.tolist() == [len(tokenizer.decode(ids[1:])) for ids in shown]
    assert documents.source_names == ["a"]
    assert set(documents.sources.tolist()) == {0}
    assert (documents.eod, documents.vocab_size, documents.tokenizer_hash) == (
        2,
        tokenizer.vocab_size,
        tokenizer.hash,
    )
    assert documents[0].dtype == np.uint16
    assert documents[0].base is not None
    assert not documents[0].flags.writeable


@pytest.mark.parametrize("index", [-1, len(TEXTS)])
def test_an_index_out_of_range_is_an_error(folder, index):
    with pytest.raises(IndexError):
        Documents.open(folder, "train")[index]


@pytest.mark.parametrize(("vocab_size", "kind"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_have_the_narrowest_dtype_that_fits_them(vocab_size, kind):
    builder = BatchBuilder(vocab_size)
    ids = np.array([2, vocab_size - 1])
    builder.add(0, ids, 1)
    documents = Documents([builder.build()], ["a"], 2, vocab_size, "")
    assert documents[0].tolist() == ids.tolist()
    assert documents[0].dtype == kind


def test_many_batches_are_one_sequence():
    builder = BatchBuilder(10)
    batches = []
    for group in ([1, 2], [], [3], [4, 5, 6]):
        for i in group:
            builder.add(i % 2, np.full(i, i), i)
        batches.append(builder.build())
    documents = Documents(batches, ["a", "b"], 2, 10, "")
    assert [documents[i].tolist() for i in range(6)] == [[i] * i for i in range(1, 7)]
    assert documents.sources.tolist() == [1, 0, 1, 0, 1, 0]


def test_the_target_before_each_answer_token_counts():
    builder = BatchBuilder(10)
    batches = []
    for group in ([[(1, 2), (2, 3), (5, 8)], None], [None], [[], [(7, 8)], None]):
        for answers in group:
            builder.add(0, np.arange(8), 0, answers)
        batches.append(builder.build())
    documents = Documents(batches, ["a"], 2, 10, "")
    counted = [documents.counted(i) for i in range(6)]
    assert [None if x is None else np.flatnonzero(x).tolist() for x in counted] == [
        [0, 1, 4, 5, 6],
        None,
        None,
        [],
        [6],
        None,
    ]
    assert documents.counts.tolist() == [5, 8, 8, 0, 1, 8]
    assert {len(x) for x in counted if x is not None} == {8}


def truncate(folder):
    shard = folder / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-20])


def swap(folder):
    (folder / "train-00000.arrow").write_bytes((folder / "validation-00000.arrow").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "train-00000.arrow: is damaged"),
        (lambda folder: (folder / "train-00000.arrow").unlink(), "train-00000.arrow: is missing"),
        (lambda folder: (folder / "train-00000.arrow").write_bytes(b""), "train-00000.arrow: is damaged"),
        (swap, "its train shards do not match its manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), r"is not a mix \(it has no manifest.json\)"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json: seed: is missing"),
    ],
)
def test_a_damaged_mix_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        Documents.open(folder, "train")


def test_an_empty_split_is_refused(folder):
    with pytest.raises(UserError, match=r"its validation split is empty: with validation = 0.0 the mix held out 0"):
        Documents.open(folder, "validation")


def test_files_of_every_kind_and_mixes_are_read_into_memory(tmp_path, tokenizer, write_jsonl):
    (tmp_path / "a.txt").write_text("plain <eod>")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"zipped"))
    write_jsonl("c.jsonl", ["one", "two"])
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "p", "response": "r"}))
    (tmp_path / "mix.toml").write_text(
        '[[sources]]\nkind = "files"\nname = "x"\nweight = 1\nfiles = ["c.jsonl"]\n'
        '[[sources]]\nkind = "files"\nname = "y"\nweight = 1\nfiles = ["q.jsonl"]\nformat = "prompt_response"\n'
    )
    names = ["a.txt", "b.md.gz", "mix.toml"]
    documents = Documents.from_files([tmp_path / name for name in names], tokenizer)
    pieces = [["plain <eod>"], ["zipped"], ["one"], ["two"], [Special.START, "p", Special.END, "r"]]
    first, second, *mixed, last = tokenizer.encode_documents(pieces)
    read = [documents[i].tolist() for i in range(5)]
    assert [*read[:2], sorted(read[2:4]), read[4]] == [first, second, sorted(mixed), last]
    assert documents.source_names == [str(tmp_path / "a.txt"), str(tmp_path / "b.md.gz"), "x", "y"]
    assert documents.sources.tolist() == [0, 1, 2, 2, 3]
    assert documents.sizes.tolist() == [11, 6, 3, 3, 2]
    assert (documents.eod, documents.tokenizer_hash) == (2, tokenizer.hash)


def test_a_bad_or_missing_file_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "b.jsonl").write_text("[]\n")
    for name, message in (("a", "no document in"), ("b", r"b\.jsonl:1: is not a JSON object"), ("c", "no such file")):
        with pytest.raises(UserError, match=message):
            Documents.from_files([tmp_path / f"{name}.jsonl"], tokenizer)


def test_a_tokenizer_is_identified_by_its_hash(folder):
    assert Documents.open(folder, "train").tokenizer_hash != train_tokenizer(iter(["x"]), 263).hash


def rewritten(folder, rows, **manifest):
    """Rewrite the training shard with documents (source, tokens, answers), and a manifest without its hash."""
    builder = BatchBuilder(280)
    for source, tokens, answers in rows:
        builder.add(source, np.array(tokens), 0, answers)
    batch = builder.build()
    with pa.ipc.new_file(str(folder / "train-00000.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    described = json.loads((folder / "manifest.json").read_text())
    split = {"documents": len(rows), "tokens": sum(len(tokens) for _, tokens, _ in rows), "bytes": 0}
    described["splits"]["train"] = split | {"shards": ["train-00000.arrow"]}
    (folder / "manifest.json").write_text(json.dumps(described | manifest))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((7, [2, 3], None), "a document has no valid source"),
        ((-1, [2, 3], None), "a document has no valid source"),
        ((0, [], None), "a document has no tokens"),
        ((0, [2, 3], [(1, 9)]), "an answer is not within its document"),
        ((0, [2, 3], [(0, 1)]), "an answer is not within its document"),
        ((0, [2, 3, 4], [(2, 1)]), "an answer is not within its document"),
        ((0, [2, 3, 4, 5], [(1, 3), (2, 4)]), "answers overlap"),
    ],
)
def test_an_invalid_shard_is_refused(folder, row, says):
    rewritten(folder, [(0, [2, 8, 9], None), row])
    with pytest.raises(UserError, match=rf"train-00000.arrow: is damaged \({says}.*; make the mix again"):
        Documents.open(folder, "train")


def test_data_of_earlier_versions_without_hashes_are_read(folder):
    rewritten(folder, [(0, [2, 8, 9], None), (0, [2, 8, 9, 10], [(1, 2), (2, 4)])])
    documents = Documents.open(folder, "train")
    assert [x.tolist() for x in documents] == [[2, 8, 9], [2, 8, 9, 10]]
    assert documents.counts.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eod": 1 << 20}, "eod: eod should be one of the vocabulary's ids"),
        ({"vocab_size": 10**9}, "vocab_size: should be less than or equal to"),
        ({"splits": {}}, "splits: splits should be train and validation"),
        ({"sources": []}, "a document has no valid source"),
    ],
)
def test_an_invalid_manifest_is_refused(folder, change, says):
    rewritten(folder, [(0, [2, 8, 9], None)], **change)
    with pytest.raises(UserError, match=says):
        Documents.open(folder, "train")


def test_a_shard_s_name_cannot_leave_its_folder(folder):
    described = json.loads((folder / "manifest.json").read_text())
    described["splits"]["train"]["shards"] = ["../train-00000.arrow"]
    (folder / "manifest.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="shards should be names of files beside the manifest"):
        Documents.open(folder, "train")


def test_a_shard_s_content_is_verified_when_it_is_first_read(folder):
    shard = folder / "train-00000.arrow"
    tokens = Documents.open(folder, "train")[0].tobytes()
    data = shard.read_bytes()
    at = data.index(tokens)
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])  # a token that the vocabulary has
    documents = Documents.open(folder, "train")
    with pytest.raises(UserError, match=r"train-00000\.arrow: is damaged \(its content does not match its SHA-256\)"):
        documents[len(documents) - 1]


@pytest.mark.slow
def test_documents_read_with_max_tokens_contain_no_more(tmp_path, tokenizer, write_jsonl):
    text = "".join(f"Line {i} of a long text.\n" for i in range(150_000))
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")  # which nobody is to come to
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(3_000_000).hex().encode())[:-99])
    write_jsonl("c.jsonl", ["short", text[:3000]])
    names = ["a.txt", "b.txt.gz", "c.jsonl"]
    some = Documents.from_files([tmp_path / name for name in names], tokenizer, 100)
    first = tokenizer.encode_document([text[:3000]])
    assert [some[i].tolist() for i in (0, 2, 3)] == [first[:101], tokenizer.encode_document(["short"]), first]
    assert some.lengths.tolist()[:2] == [101, 101]
    assert not some.complete
    longer = Documents.from_files([tmp_path / "a.txt"], tokenizer, 200_000)  # of several parts
    assert longer[0].tolist() == tokenizer.encode_document([text[:1_500_000]])[:200_001]
    assert Documents.from_files([tmp_path / "c.jsonl"], tokenizer, 10_000).complete
    with pytest.raises(
        UserError, match=rf"a\.txt: is not valid UTF-8: byte 0xff at offset {len(text)} \(line 150001\)"
    ):
        Documents.from_files([tmp_path / "a.txt"], tokenizer)
    with pytest.raises(UserError, match=r"a\.txt: is not valid UTF-8: byte 0xff at offset"):
        Documents.from_files([tmp_path / "a.txt"], tokenizer, 10**9)


@pytest.mark.parametrize("max_tokens", [None, 100])
@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", b"{}\n" * 50_000, "is ambiguous"),
        ("a.ndjson", b"{}\n" * 50_000, "is ambiguous"),
        ("a.txt", ("text " * 20_000).encode("utf-16"), "is UTF-16, where UTF-8 is expected"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n" * 2_000, "is a git-lfs pointer"),
    ],
)
def test_a_long_file_that_is_not_text_is_refused_even_if_only_its_beginning_is_read(
    tmp_path, tokenizer, name, content, what, max_tokens
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {what}"):
        Documents.from_files([tmp_path / name], tokenizer, max_tokens)
