"""A streamed mix gives the documents of the prepared one, from any point on, for one process or several."""

import io
import pickle
import random
from collections import Counter
from contextlib import suppress

import pytest
import torch

from rmkv_cli.config import MixConfig
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.encoding import parallel_encoder
from rmkv_cli.data.lanes import EndOfData, Lanes, Prepared
from rmkv_cli.data.mix import prepare
from rmkv_cli.data.mixer import Mixer
from rmkv_cli.data.stream import Stream
from rmkv_cli.errors import UserError

EOD = 2


@pytest.fixture
def mix(write_jsonl):
    """Texts of which some come twice, read about three times; noise; a task in text; two phases."""
    write_jsonl("a.jsonl", [f"Text {i % 90} " + "word " * (i * 7 % 50) for i in range(100)])
    write_jsonl("b.jsonl", [f"Other {i}" for i in range(300)])
    return MixConfig(
        tokens=20_000,
        validation=0.1,
        sources=[
            {"kind": "files", "name": "a", "weight": 2, "files": ["a.jsonl"], "deduplicate": True},
            {"kind": "files", "name": "b", "weight": 1, "files": ["b.jsonl"], "when_dry": "drop"},
            {"kind": "noise", "name": "noise", "weight": 1, "vocab": 20},
            {"kind": "recall", "segments": [1], "segment_length": 20, "text": "a", "keys": 4, "values": 4},
        ],
        phases=[{"share": 1, "moves": True, "weights": {"noise": 0}}, {"share": 2}],
    )


def mixed(mix, base, tokenizer, splits="train"):
    """All documents of a mix, (source, tokens) each."""
    with parallel_encoder(tokenizer, 1) as submit:
        mixer = Mixer(mix, base, tokenizer, submit, 2, splits)
        return [(index, tuple(document.tokens.tolist())) for index, document in mixer]


def test_the_mixer_resumes_from_any_document(tmp_path, tokenizer, mix, monkeypatch):
    monkeypatch.setattr("rmkv_cli.data.encoding.GROUP_DOCUMENTS", 7)
    with parallel_encoder(tokenizer, 1) as submit:

        def make():
            return Mixer(mix, tmp_path, tokenizer, submit, 2, "train")

        mixer, given, states = make(), [], []
        states.append((mixer.state_dict(), set()))
        for index, document in mixer:
            given.append((index, document.tokens.tolist(), document.answers))
            states.append((pickle.loads(pickle.dumps(mixer.state_dict())), set(mixer.readers[0].seen)))
        assert len({index for index, *_ in given}) == 4
        assert mixer.readers[0].epochs > 1
        for at in random.Random(0).sample(range(len(states)), 20):
            other = make()
            other.load_state_dict(states[at][0])
            other.readers[0].seen.update(states[at][1])
            rest = [(index, document.tokens.tolist(), document.answers) for index, document in other]
            assert rest == given[at:]


@pytest.mark.slow
def test_rows_of_a_stream_equal_those_of_the_prepared_mix_and_resume_exactly(tmp_path, tokenizer, mix, monkeypatch):
    prepare(mix, tmp_path, tokenizer, tmp_path / "out", 2)
    documents = Documents.open(tmp_path / "out", "train")
    prepared = Lanes(Prepared(documents, 0), 3, EOD)
    lengths = [random.Random(0).randint(1, 400) for _ in range(30)]  # 3 lanes: less than the whole

    def plain(rows):
        return rows.input_ids.tolist(), rows.targets.tolist(), rows.document_ids.tolist()

    rows = [plain(prepared.next(length)) for length in lengths]
    state = None
    for start in range(0, 30, 10):  # three times begun, each time killed after a few rows more than were saved
        with Stream(mix, tmp_path, tokenizer) as stream:
            lanes = Lanes(stream, 3, EOD)
            if state is not None:
                lanes.load_state_dict(pickle.loads(state))
            for at in range(start, start + 10):
                assert plain(lanes.next(lengths[at])) == rows[at]
            place = lanes.bookmark()
            lanes.next(50)
            state = pickle.dumps(place())


@pytest.mark.slow
def test_a_long_document_of_a_stream_is_one_document_and_resumes_from_any_row(tmp_path, tokenizer, mix_of):
    lines = "".join(f"Line {i} of a long text. " * (i % 9) + "\n" for i in range(12_000))
    (tmp_path / "a.txt").write_text(lines)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"A short one, {number}")
    mix = mix_of({"a": (1, "*.txt")}, validation=0.1, tokens=1_200_000)
    prepare(mix, tmp_path, tokenizer, tmp_path / "out", 1)
    documents = Documents.open(tmp_path / "out", "train")
    assert sorted(documents.sizes.tolist())[-1] > 1 << 20
    prepared = Lanes(Prepared(documents, 0), 2, EOD)
    rows = [prepared.next(500) for _ in range(40)]
    with Stream(mix, tmp_path, tokenizer) as stream:
        lanes = Lanes(stream, 2, EOD)
        for row in rows[:20]:
            assert lanes.next(500).input_ids.tolist() == row.input_ids.tolist()
        file = io.BytesIO()
        torch.save(lanes.state_dict(), file)  # as in a checkpoint
    assert len(file.getvalue()) < 2 * 2.1 * documents.lengths.max()  # two bytes a token in two lanes
    with Stream(mix, tmp_path, tokenizer) as stream:
        lanes = Lanes(stream, 2, EOD)
        lanes.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        for row in rows[20:]:
            assert [x.tolist() for x in vars(lanes.next(500)).values()] == [x.tolist() for x in vars(row).values()]


def test_ranks_see_disjoint_documents_that_are_together_the_single_stream(tmp_path, tokenizer, mix):
    """Each of three ranks is dealt its lanes' part of the rows (see `Trainer`)."""
    once = [source.model_copy(update={"when_dry": "drop"}) for source in mix.sources[:2]]
    mix = mix.model_copy(update={"tokens": None, "phases": [], "sources": once})
    whole = Counter(document for _, document in mixed(mix, tmp_path, tokenizer))
    lanes = 6
    seen = [Counter() for _ in range(lanes)]  # the whole documents of each lane
    begun = [[] for _ in range(lanes)]
    with Stream(mix, tmp_path, tokenizer) as stream, suppress(EndOfData):
        rows = Lanes(stream, lanes, EOD)
        while True:
            row = rows.next(40)
            for lane, (ids, targets) in enumerate(zip(row.input_ids, row.targets, strict=True)):
                for token, target in zip(ids.tolist(), targets.tolist(), strict=True):
                    begun[lane].append(token)
                    if target == EOD:
                        seen[lane][tuple(begun[lane])] += 1
                        begun[lane] = []
    assert max(whole.values()) == 1  # duplicates are left out, wherever they are seen
    together = sum(seen, Counter())
    assert max(together.values()) == 1
    assert not together - whole
    assert sum(together.values()) > 0.9 * len(whole)  # the rest lies in rows that did not come to their end
    assert all(sum((seen[2 * rank] + seen[2 * rank + 1]).values()) > 0.2 * len(whole) for rank in range(3))


def test_what_is_held_out_never_trains(tmp_path, tokenizer, mix):
    train, held = (Counter(mixed(mix, tmp_path, tokenizer, splits)) for splits in ("train", "validation"))
    texts = {text for text in train if text[0] < 2}
    assert texts
    assert not texts & set(held)
    assert all(times == 1 for (source, _), times in held.items() if source < 2)


def test_an_exhausted_source_is_repeated_dropped_or_ends_the_mix(tmp_path, tokenizer, write_jsonl, capsys):
    write_jsonl("a.jsonl", [f"a {i}" for i in range(30)])
    write_jsonl("b.jsonl", [f"b {i}" for i in range(300)])
    ends = {}
    for policy in ("repeat", "drop", "stop"):
        sources = [
            {"kind": "files", "name": name, "weight": 1, "files": [f"{name}.jsonl"], "when_dry": when}
            for name, when in (("a", policy), ("b", "stop"))
        ]
        tokens = 10**6 if policy == "repeat" else None if policy == "drop" else 10**6
        given = mixed(MixConfig(tokens=tokens, validation=0, sources=sources), tmp_path, tokenizer)
        counts = Counter(index for index, _ in given)
        ends[policy] = counts[0], counts[1]
        messages = capsys.readouterr().err
        assert ("epoch 2 begins" in messages) == (policy == "repeat")
        assert ("exhausted, so it is dropped" in messages) == (policy == "drop")
    assert ends["drop"] == (30, 300)
    assert ends["repeat"][0] > 200
    assert ends["repeat"][1] == 300
    assert ends["stop"][0] == 30
    assert ends["stop"][1] < 50


@pytest.mark.slow
def test_the_end_of_the_data_and_its_faults_are_reported(tmp_path, tokenizer, write_jsonl, monkeypatch):
    write_jsonl("a.jsonl", ["one", "two", "three"])
    source = {"kind": "files", "name": "a", "weight": 1, "files": ["a.jsonl"], "when_dry": "stop"}
    with Stream(MixConfig(validation=0, sources=[source]), tmp_path, tokenizer) as stream:
        for _ in range(3):
            stream.next()
        with pytest.raises(EndOfData, match="end of the data: source 'a' is exhausted"):
            stream.next()
    source["when_dry"] = "drop"
    with (
        Stream(MixConfig(validation=0, sources=[source]), tmp_path, tokenizer) as stream,
        pytest.raises(EndOfData, match="end of the data: all sources are exhausted"),
    ):
        list(iter(stream.next, None))
    (tmp_path / "a.jsonl").write_text("broken")
    with (
        Stream(MixConfig(validation=0, sources=[source]), tmp_path, tokenizer) as stream,
        pytest.raises(UserError, match=r"a\.jsonl:1: is not valid JSON"),
    ):
        stream.next()
    with (
        Stream(MixConfig(validation=0, sources=[source]), tmp_path / "gone", tokenizer) as stream,
        pytest.raises(UserError, match=r"gone/a\.jsonl: no such file"),
    ):
        stream.next()


def test_the_death_of_the_reading_process_is_reported(tmp_path, tokenizer, mix):
    with Stream(mix, tmp_path, tokenizer) as stream:
        stream.next()
        stream._process.kill()
        with pytest.raises(UserError, match="the process that reads the data died"):
            list(iter(stream.next, None))  # what was sent before, and then
