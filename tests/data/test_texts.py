"""Long texts are read in parts, have the tokens of the whole text, and hold out their last part."""

import codecs
import gzip
import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pytest

from rmkv_cli.config import FileSource
from rmkv_cli.data.blocks import START, BadRecord
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.encoding import parallel_encoder
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.mix import hold_out, prepare, warn_of_sources_without_held_out
from rmkv_cli.data.mixer import Mixer
from rmkv_cli.data.order import Place
from rmkv_cli.data.sources import LeftOut, open_source, read_source
from rmkv_cli.data.splits import digest
from rmkv_cli.data.survey import survey_folder
from rmkv_cli.errors import UserError


def story(seed, size):
    """Return lines of words and numbers, of `size` bytes or up to a line more."""
    rng, text = random.Random(seed), ""
    while len(text) < size:
        text += " ".join(rng.choices(["naïve", "def f(x):", "12", "It's", "words,", "我们走吧。你好"], k=8)) + "\n"
    return text


@pytest.fixture
def short_parts(monkeypatch):
    """A part is 200 characters; a document of 2,000 bytes is long, and its stretch has at least 50."""
    monkeypatch.setattr("rmkv_cli.data.texts.PART", 200)
    monkeypatch.setattr("rmkv_cli.data.splits.LONG", 2000)
    monkeypatch.setattr("rmkv_cli.data.splits.SHORTEST", 50)


def source(*files, **rest):
    return FileSource(kind="files", name="it", weight=1, files=list(files), **rest)


def read(folder, *files, **rest):
    text_source = source(*files, **rest)
    return list(read_source(text_source, open_source(text_source, folder)))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_long_text_is_read_in_parts_and_reading_starts_at_any_part(tmp_path, short_parts, name, mark):
    text = story(0, 5000)
    data = mark + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "z.txt").write_text("short")
    pairs = read(tmp_path, name, "z.txt")
    *parts, last = [item for _, item in pairs]
    assert len(parts) > 15
    assert "".join(part.pieces[0] for part in parts) == text
    assert [part.part.before for part in parts] == [0, *itertools.accumulate(part.size for part in parts[:-1])]
    assert {(part.part.total, part.part.characters) for part in parts} == {(len(text.encode()), len(text))}
    assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(parts[3].part.reread()) == text
    assert (last.pieces, last.part, last.first, last.last) == (("short",), None, True, True)

    def plain(pairs):
        return [(place, item.pieces, item.part and item.part.before) for place, item in pairs]

    text_source = source(name, "z.txt")
    for at, (place, _) in enumerate(pairs):
        place = Place.from_json(place.to_json())
        assert plain(read_source(text_source, open_source(text_source, tmp_path), place=place)) == plain(
            pairs[at + 1 :]
        )


def test_a_place_saved_when_long_texts_were_read_whole_is_after_the_whole_text(tmp_path, short_parts):
    (tmp_path / "a.txt").write_text(story(0, 5000))
    (tmp_path / "b.txt").write_text("next")
    text_source = source("a.txt", "b.txt")
    rest = read_source(text_source, open_source(text_source, tmp_path), place=Place(0, 0, START, 1))
    assert [item.pieces for _, item in rest] == [("next",)]


@pytest.mark.parametrize(
    ("damage", "what"),
    [(b"\xff", "is not valid UTF-8: byte 0xff at offset {at} (line {line})"), (b"\0", "contains a NUL byte")],
)
def test_an_invalid_long_text_yields_nothing(tmp_path, short_parts, damage, what):
    data = story(0, 5000).encode()
    at = data.index(b"\n", 4000) + 1
    (tmp_path / "a.txt").write_bytes(data[:at] + damage + data[at:])
    (tmp_path / "z.txt").write_text("fine")
    (_, bad), (_, fine) = read(tmp_path, "a.txt", "z.txt")
    assert str(bad).startswith(f"{tmp_path / 'a.txt'}: " + what.format(at=at, line=data.count(b"\n", 0, at) + 1))
    assert fine.pieces == ("fine",)


def test_an_incomplete_last_character_of_a_long_text_is_reported_with_its_location(tmp_path, short_parts):
    data = story(0, 5000).encode()
    (tmp_path / "a.txt").write_bytes(data + "é".encode()[:1])
    ((_, bad),) = read(tmp_path, "a.txt")
    assert f"byte 0xc3 at offset {len(data)} " in str(bad)


def test_a_long_text_that_changes_while_it_is_read_is_an_error(tmp_path, short_parts):
    (tmp_path / "a.txt").write_text(story(0, 400_000))
    text_source = source("a.txt")
    reading = read_source(text_source, open_source(text_source, tmp_path))
    next(reading)
    (tmp_path / "a.txt").write_bytes(b"gone")
    with pytest.raises(UserError, match=r"a\.txt: changed while it was read"):
        list(reading)


def test_long_texts_are_filtered_by_their_whole_length_and_reported_as_bad_once(tmp_path, short_parts):
    (tmp_path / "a.txt").write_text(story(0, 5000))
    (tmp_path / "b.txt").write_text("short")
    left_out, kept = [item for _, item in read(tmp_path, "a.txt", "b.txt", max_characters=4000)]
    assert (left_out, kept.pieces) == (LeftOut(), ("short",))
    assert len(read(tmp_path, "a.txt", min_characters=4000)) > 15
    items = [item for _, item in read(tmp_path, "a.txt", where={"language": ["en"]})]
    assert [type(item) for item in items] == [BadRecord]


def test_turns_are_found_in_the_whole_long_text(tmp_path, short_parts):
    turns = "".join(f"<|start_header_id|>user<|end_header_id|>\n\nWhy {i}?<|eot_id|>" for i in range(50))
    (tmp_path / "a.txt").write_text(turns)
    ((_, document),) = read(tmp_path, "a.txt", format="messages", messages_column="text")
    assert document.pieces[1::3] == tuple(f"Why {i}?" for i in range(50))


def whole(folder, split):
    documents = Documents.open(folder, split)
    return [documents[i].tolist() for i in range(len(documents))]


def mixed(mix, base, tokenizer, splits, state=None, **rest):
    """Return a mix's parts, each (source, tokens, held out, continues), and the mixer's state after each part."""
    with parallel_encoder(tokenizer, 1) as submit:
        mixer = Mixer(mix, base, tokenizer, submit, 2, splits, **rest)
        if state:
            mixer.load_state_dict(state)
        given = []
        for index, document in mixer:
            given.append((index, document.tokens.tolist(), document.held_out, document.continues))
            yield given[-1], mixer.state_dict()


def joined(parts):
    """Join parts into documents."""
    documents = []
    for (index, tokens, held_out, continues), _ in parts:
        if continues:
            assert documents[-1][::2] == (index, held_out)
            documents[-1] = (index, documents[-1][1] + tokens, held_out)
        else:
            documents.append((index, tokens, held_out))
    return documents


@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_text_is_a_document_of_several_rows_and_its_last_part_is_held_out(
    tmp_path, short_parts, tokenizer, mix_of, monkeypatch, workers
):
    monkeypatch.setattr("rmkv_cli.data.shards.BATCH_TOKENS", 1000)
    monkeypatch.setattr("rmkv_cli.data.shards.SHARD_BYTES", 2_000)
    text = story(0, 20_000)
    (tmp_path / "a.txt").write_text(text)
    manifest = prepare(mix_of({"a": (1, "a.txt")}, validation=0.1), tmp_path, tokenizer, tmp_path / "out", workers)
    (train,), (held_out,) = whole(tmp_path / "out", "train"), whole(tmp_path / "out", "validation")
    size = len(tokenizer.decode(train[1:]).encode())
    assert 0.895 < size / len(text.encode()) < 0.9
    cut = len(text.encode()[:size].decode())
    assert text[cut - 1] in " \n"
    assert (train, held_out) == (tokenizer.encode_document([text[:cut]]), tokenizer.encode_document([text[cut:]]))
    documents = Documents.open(tmp_path / "out", "train")
    assert len(manifest.splits["train"].shards) > 2
    assert (documents.lengths.tolist(), documents.sizes.tolist()) == ([len(train)], [size])
    assert documents.counts.tolist() == [len(train)]
    assert (documents.sources.tolist(), documents.counted(0)) == ([0], None)
    (report,) = manifest.sources
    assert (report.documents, report.tokens) == (1, len(train))
    assert (report.held_out_documents, report.held_out_tokens) == (1, len(held_out))
    for start, stop in ((0, 0), (0, 1), (150, 950), (len(train) - 1, None), (len(train), None), (0, 10**9)):
        assert documents.part(0, start, stop).tolist() == train[start:stop]


def test_a_long_record_gives_a_stretch_too_and_the_same_as_a_file(tmp_path, tokenizer, write_jsonl, mix_of):
    text = story(0, 100_000)
    (tmp_path / "a.txt").write_text(text)
    write_jsonl("b.jsonl", [text])
    found = []
    for name in ("a.txt", "b.jsonl"):
        prepare(mix_of({"it": (1, name)}, validation=0.1), tmp_path, tokenizer, tmp_path / f"{name}-out", 1)
        found.append([whole(tmp_path / f"{name}-out", split) for split in ("train", "validation")])
    assert found[0] == found[1]
    assert len(found[0][1][0]) > 1000


@pytest.mark.parametrize(
    ("text", "before"),
    [("words and more " * 300, " "), ("x" * 5000, "x"), ("長" * 2000, "長"), ("a\n" + "word " * 1500, " ")],
)
def test_without_a_near_line_end_a_stretch_begins_at_a_word_or_anywhere(
    tmp_path, short_parts, tokenizer, mix_of, text, before
):
    (tmp_path / "a.txt").write_text(text)
    prepare(mix_of({"a": (1, "a.txt")}, validation=0.2), tmp_path, tokenizer, tmp_path / "out", 1)
    (train,), (held_out,) = (
        [tokenizer.decode(ids[1:]) for ids in whole(tmp_path / "out", split)] for split in ("train", "validation")
    )
    assert train + held_out == text
    assert train.endswith(before)
    assert 0.19 < len(held_out) / len(text) < 0.24


@pytest.fixture
def books(tmp_path, short_parts, write_jsonl, mix_of):
    """A mix of two repeated sources; one has long and short texts, two of which are equal."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(story(number % 4, 3000))
    for number in range(5, 30):
        (tmp_path / f"{number}.txt").write_text(f"A short one, {number} " * number)
    write_jsonl("b.jsonl", [f"Other {i} " * (i % 9) for i in range(200)])
    mix = mix_of({"a": (2, "*.txt"), "b": (1, "b.jsonl")}, validation=0.2, tokens=12_000)
    first = mix.sources[0].model_copy(update={"deduplicate": True})
    return mix.model_copy(update={"sources": [first, mix.sources[1]]})


def test_streams_hold_out_what_a_prepared_mix_does_and_never_train_on_it(tmp_path, tokenizer, books):
    both = joined(mixed(books, tmp_path, tokenizer, "both"))
    train = joined(mixed(books, tmp_path, tokenizer, "train"))
    assert train == [document for document in both if not document[2]]
    everything = books.model_copy(update={"tokens": 10**9})
    validation = joined(mixed(everything, tmp_path, tokenizer, "validation"))
    texts = {tokenizer.decode(tokens[1:]) for _, tokens, _ in train}
    stretches = [
        text for text in (tokenizer.decode(tokens[1:]) for _, tokens, _ in validation) if len(text.encode()) > 400
    ]
    assert len([text for text in stretches if "naïve" in text]) == 4  # one of each long text that is not a duplicate
    for text in stretches:
        assert not any(text in other or text[: len(text) // 2] in other for other in texts)
    assert {tuple(tokens) for _, tokens, held_out in both if held_out} <= {tuple(tokens) for _, tokens, _ in validation}


def test_the_mixer_resumes_from_any_part(tmp_path, tokenizer, books):
    pairs = list(mixed(books, tmp_path, tokenizer, "train"))
    assert any(part[3] for part, _ in pairs)
    unique = books.model_copy(update={"sources": [s.model_copy(update={"deduplicate": False}) for s in books.sources]})
    pairs = list(mixed(unique, tmp_path, tokenizer, "train"))
    for at in random.Random(0).sample(range(len(pairs)), 12):
        rest = [part for part, _ in mixed(unique, tmp_path, tokenizer, "train", pairs[at][1])]
        assert rest == [part for part, _ in pairs[at + 1 :]]


def test_a_duplicate_of_a_long_text_is_left_out_with_its_stretch_and_counted_once(tmp_path, tokenizer, books):
    once = books.model_copy(update={"tokens": None, "sources": [books.sources[0]]})
    manifest = prepare(once, tmp_path, tokenizer, tmp_path / "out", 1)
    assert manifest.sources[0].duplicates == 1
    held_out = [text for text in map(tokenizer.decode, whole(tmp_path / "out", "validation")) if "naïve" in text]
    assert len(held_out) == len(set(held_out)) == 4


def test_the_order_is_the_same_however_long_a_part_is(tmp_path, tokenizer, books, monkeypatch):
    found = joined(mixed(books, tmp_path, tokenizer, "train"))
    monkeypatch.setattr("rmkv_cli.data.texts.PART", 1000)
    assert joined(mixed(books, tmp_path, tokenizer, "train")) == found


def test_without_stretches_long_texts_are_held_out_whole_by_their_digest(tmp_path, tokenizer, books):
    """Runs that an earlier version began use this rule."""
    once = books.model_copy(update={"tokens": None, "validation": 0.5})
    validation = joined(mixed(once, tmp_path, tokenizer, "validation", stretches=False))
    texts = [(tmp_path / f"{number}.txt").read_text() for number in range(30)]
    chosen = {text for text in texts if digest(0, text.encode()) < 2**63}
    assert {tokenizer.decode(tokens[1:]) for index, tokens, _ in validation if index == 0} == chosen
    assert any(len(text) > 2500 for text in chosen)


def test_a_mix_of_format_1_can_be_read(tmp_path, tokenizer, write_jsonl, mix_of):
    prepare(mix_of({"a": (1, write_jsonl("a.jsonl", ["one", "two"]))}), tmp_path, tokenizer, tmp_path / "out", 1)
    now = whole(tmp_path / "out", "train")
    shard, manifest = tmp_path / "out" / "train-00000.arrow", tmp_path / "out" / "manifest.json"
    old = pa.ipc.open_file(shard.read_bytes()).read_all().drop_columns("continues")
    shard.unlink()
    with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_file(file, old.schema) as writer:
        writer.write_table(old)
    plain = json.loads(manifest.read_text()) | {"format": 1}
    for report in plain["sources"]:
        del report["held_out_documents"], report["held_out_tokens"]
    for split in plain["splits"].values():
        for key in split.keys() - {"documents", "tokens", "bytes", "shards"}:
            del split[key]
    manifest.write_text(json.dumps(plain))
    assert whole(tmp_path / "out", "train") == now
    assert Manifest.load(tmp_path / "out").sources[0].held_out_tokens is None


def test_a_single_shard_may_begin_within_a_document(tmp_path, short_parts, tokenizer, mix_of, monkeypatch):
    monkeypatch.setattr("rmkv_cli.data.shards.BATCH_TOKENS", 500)
    monkeypatch.setattr("rmkv_cli.data.shards.SHARD_BYTES", 1_000)
    (tmp_path / "a.txt").write_text(story(0, 9000))
    manifest = prepare(mix_of({"a": (1, "a.txt")}, validation=0), tmp_path, tokenizer, tmp_path / "out", 1)
    shards = manifest.splits["train"].shards
    parts = [Documents.of_shards(tmp_path / "out", manifest, [shard]) for shard in shards]
    assert sum(map(len, parts)) > 5
    assert np.concatenate([ids for part in parts for ids in part]).tolist() == whole(tmp_path / "out", "train")[0]


def test_each_source_s_held_out_share_is_known_and_one_without_any_is_named(
    tmp_path, tokenizer, write_jsonl, mix_of, capsys
):
    (tmp_path / "book.txt").write_text(story(0, 80_000))
    write_jsonl("few.jsonl", ["one", "two"])
    mix = mix_of({"book": (1, "book.txt"), "few": (1, "few.jsonl"), "noise": (1, 9)}, validation=0.1, tokens=30_000)
    manifest = prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    assert manifest.sources_without_held_out() == ["few"]
    capsys.readouterr()
    warn_of_sources_without_held_out(manifest)
    warning = "warning: source 'few': none of its text is held out, so validation does not measure it; raise "
    assert capsys.readouterr().err.startswith(warning)
    book, few, _ = manifest.sources
    assert 0.09 < book.held_out_tokens / (book.held_out_tokens + book.tokens) < 0.12
    assert (book.held_out_documents, few.held_out_documents, few.held_out_tokens) == (1, 0, 0)
    held_out = Documents.open(tmp_path / "out", "validation")
    assert held_out.lengths[held_out.sources == 0].sum() == book.held_out_tokens
    survey = survey_folder(tmp_path / "out", 1)
    found = [(report.held_out_documents, report.held_out_tokens) for report in survey]
    assert found == [(report.held_out_documents, report.held_out_tokens) for report in manifest.sources]
    assert (
        prepare(
            mix.model_copy(update={"validation": 0.0}), tmp_path, tokenizer, tmp_path / "all", 1
        ).sources_without_held_out()
        == []
    )


def test_a_run_s_held_out_documents_are_the_stretches_and_a_source_without_any_is_named(
    tmp_path, tokenizer, write_jsonl, mix_of
):
    (tmp_path / "book.txt").write_text(text := story(0, 1_500_000))
    write_jsonl("few.jsonl", ["one", "two"])
    mix = mix_of({"book": (1, "book.txt"), "few": (1, "few.jsonl")}, validation=0.4, seed=2)
    manifest = hold_out(mix, tmp_path, tokenizer, 1000, tmp_path / "out", 1)
    assert manifest.sources_without_held_out() == ["few"]
    assert 1000 <= manifest.splits["validation"].tokens < 500_000  # it ends with the part that has its tokens
    (held_out,) = whole(tmp_path / "out", "validation")
    assert text.index(tokenizer.decode(held_out[1:])) > 850_000
