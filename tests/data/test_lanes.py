"""Lanes read every token once per epoch, without cropping or padding, and resume exactly."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_documents import make_documents

from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.errors import UserError

EOD = 2
rows = st.lists(st.integers(1, 9), min_size=1, max_size=20)
sets = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def numbered(lengths):
    """Documents in which every token of all of them is another number, but for the first, which is EOD."""
    ids = iter(range(100, 100_000))
    return make_documents([[next(ids) for _ in range(n)] for n in lengths], vocab_size=1 << 20)


def make_lanes(documents, lanes, seed):
    return Lanes(Prepared(documents, seed), lanes, EOD)


def streams(lanes, row_lengths):
    """Each lane's (input_ids, targets, document_ids) over the rows."""
    rows = [lanes.next(length) for length in row_lengths]
    assert all(r.input_ids.shape == (len(r.targets), n) for r, n in zip(rows, row_lengths, strict=True))
    return np.concatenate([np.stack([r.input_ids, r.targets, r.document_ids], 1) for r in rows], 2)


def queue(documents, seed):
    """Return the documents' numbers in the order in which lanes take them."""
    yield from range(len(documents))
    for epoch in itertools.count(1):
        yield from np.random.default_rng([seed, epoch]).permutation(len(documents)).tolist()


def token_by_token(documents, lane_count, seed, row_lengths, answers=None):
    """Return the expected `streams`, computed token by token; `answers` has the spans of each document."""
    numbers = queue(documents, seed)
    given = [[] for _ in range(lane_count)]
    rest = [[] for _ in range(lane_count)]
    count = [-1] * lane_count
    for length in row_lengths:
        for lane in range(lane_count):
            for _ in range(length):
                if not rest[lane]:
                    number = next(numbers)
                    ids = documents[number].tolist()
                    targets = [*ids[1:], EOD]
                    if answers and answers[number] is not None:
                        asked = {i for start, stop in answers[number] for i in range(start, stop)}
                        targets = [target if i + 1 in asked else -100 for i, target in enumerate(targets)]
                    rest[lane] = list(zip(ids, targets, strict=True))
                    count[lane] += 1
                (token, target), *rest[lane] = rest[lane]
                given[lane].append((token, target, count[lane]))
    return np.array(given).transpose(0, 2, 1)


@settings(max_examples=150, deadline=None)
@given(sets, st.integers(1, 4), st.integers(0, 3), rows)
def test_each_lane_consists_of_whole_consecutive_documents(lengths, lane_count, seed, row_lengths):
    documents = numbered(lengths)
    given_ = streams(make_lanes(documents, lane_count, seed), row_lengths)
    assert (given_ == token_by_token(documents, lane_count, seed, row_lengths)).all()


@settings(max_examples=150, deadline=None)
@given(sets, st.integers(1, 3), rows, st.randoms())
def test_only_the_answers_of_a_document_are_targets(lengths, lane_count, row_lengths, random):
    edges = [sorted(random.sample(range(1, n + 2), random.randrange(n + 2) // 2 * 2)) for n in lengths]
    answers = [random.choice([None, list(zip(e[::2], e[1::2], strict=True))]) for e in edges]
    ids = iter(range(100, 100_000))
    documents = make_documents([[next(ids) for _ in range(n)] for n in lengths], vocab_size=1 << 20, answers=answers)
    given_ = streams(make_lanes(documents, lane_count, 0), row_lengths)
    assert (given_ == token_by_token(documents, lane_count, 0, row_lengths, answers)).all()


@settings(max_examples=100, deadline=None)
@given(sets, st.integers(1, 4), st.integers(0, 3), rows, rows)
def test_a_saved_state_resumes_exactly(lengths, lane_count, seed, before, after):
    documents = numbered(lengths)
    lanes = make_lanes(documents, lane_count, seed)
    streams(lanes, before)
    place = lanes.bookmark()
    state = json.loads(json.dumps(place()))
    resumed = make_lanes(documents, lane_count, seed)
    streams(resumed, [3])
    resumed.load_state_dict(state)
    assert (streams(lanes, after) == streams(resumed, after)).all()
    assert lanes.state_dict() == resumed.state_dict()
    assert place() == state


@pytest.mark.parametrize(
    ("lengths", "lanes", "seed", "key"),
    [([3], 2, 0, "documents"), ([3, 4], 1, 0, "lanes"), ([3, 4], 2, 1, "seed")],
)
def test_the_state_of_other_lanes_is_refused(lengths, lanes, seed, key):
    state = make_lanes(numbered([3, 4]), 2, 0).state_dict()
    with pytest.raises(UserError, match=f"the checkpoint has {key} = "):
        make_lanes(numbered(lengths), lanes, seed).load_state_dict(state)


def as_once(lanes):
    """Return the lanes' state as versions before format 2 saved it, with the rests of the documents as lists."""
    state = lanes.state_dict()
    rests = []
    for lane in lanes._lanes:
        tokens = lane.document.part(lane.offset, len(lane.document))
        counted = lane.document.counted(lane.offset, len(lane.document))
        rests.append([tokens.tolist(), None if counted is None else counted.tolist(), lane.number])
    return {"queue": state["queue"], "lanes": rests}


@settings(max_examples=50, deadline=None)
@given(sets, st.integers(1, 4), rows, rows, rows)
def test_the_state_of_an_earlier_version_resumes_exactly(lengths, lane_count, before, between, after):
    ids = iter(range(100, 100_000))
    answers = [[(1, n // 2 + 1)] if n % 2 else None for n in lengths]
    documents = make_documents([[next(ids) for _ in range(n)] for n in lengths], vocab_size=1 << 20, answers=answers)
    lanes = make_lanes(documents, lane_count, 0)
    streams(lanes, before)
    resumed = make_lanes(documents, lane_count, 0)
    resumed.load_state_dict(json.loads(json.dumps(as_once(lanes))))
    assert (streams(lanes, between) == streams(resumed, between)).all()
    again = make_lanes(documents, lane_count, 0)
    again.load_state_dict(resumed.state_dict())
    assert (streams(lanes, after) == streams(again, after)).all()


def test_the_state_of_prepared_data_does_not_grow_with_a_document():
    lanes = make_lanes(numbered([50_000]), 2, 0)
    lanes.next(10)
    assert lanes.state_dict()["lanes"] == [{"document": 0, "offset": 10, "number": 0}] * 2
