"""The three rules of the model: causal, one function three ways, documents are islands."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CELLS, EVERY, IMPORTED, MEMORIES, POSITIONS, PUBLISHED, make_model, with_adapter

from rmkv_cli.model import RMKV, State, reset_memory, reset_recent, swap_memory

SHAPES = [{"memory": memory, "position": position, "lookback": lookback} for memory, position, lookback in EVERY]
KINDS = [  # each memory once more, with an adapter on every layer that can have one
    *((shape, False) for shape in [*SHAPES, *IMPORTED]),
    *((shape, True) for shape in [*SHAPES[:: len(POSITIONS)], IMPORTED[-1]]),
]


def model_of(shape, adapted):
    model = make_model(**shape)
    return with_adapter(model) if adapted else model


def tokens(batch, length, seed=0):
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_causal_bit_for_bit(kind):
    model = model_of(*kind)
    ids = tokens(2, 23)
    before = model(ids)[0]
    for i in (0, 4, 5, 11, 22):
        changed = ids.clone()
        changed[:, i] = (changed[:, i] + 1) % 13
        after = model(changed)[0]
        assert torch.equal(after[:, :i], before[:, :i])
        assert not torch.equal(after[:, i:], before[:, i:])


def test_published_wiring_sees_the_future_from_the_second_layer_up():
    ids = tokens(1, 5)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 13
    leaks = {}
    for layers in (1, 2):
        model = make_model(num_hidden_layers=layers, memory=PUBLISHED)
        leaks[layers] = not torch.equal(model(changed)[0][:, :4], model(ids)[0][:, :4])
    assert leaks == {1: False, 2: True}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_three_ways_give_the_same_logits(kind):
    model = model_of(*kind)
    assert_three_ways(model, tokens(2, 23), tolerance=1e-9)


def test_three_ways_in_float32():
    assert_three_ways(make_model().float(), tokens(2, 40), tolerance=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_cut_of_any_text_gives_the_same_logits(data):
    S = data.draw(st.integers(1, 7), "segment length")
    model = make_model(
        segment_length=S,
        lookback=data.draw(st.integers(0, S), "look-back"),
        position=data.draw(st.sampled_from(POSITIONS)),
        memory={
            "cell": data.draw(st.sampled_from(CELLS)),
            "update": data.draw(st.sampled_from(["carry", "published", "none"])),
            "slots": data.draw(st.sampled_from([0, 3])),
            "store": data.draw(st.integers(0, 2)),
        },
    )
    length = data.draw(st.integers(1, 30), "length")
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(1, length), max_size=5), "cuts")})
    ids = tokens(2, length)
    starts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4), "document starts"))
    document_ids = torch.stack([(torch.arange(length)[:, None] >= torch.tensor([0, *starts])).sum(1)] * 2)
    whole, _ = model(ids, document_ids=document_ids)
    state, parts = None, []
    for start, stop in itertools.pairwise(cuts):
        logits, state = model(ids[:, start:stop], state, document_ids[:, start:stop])
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_documents_are_islands(kind):
    """Whatever stands in the other documents of a row, a document's logits are the same, bit for bit.

    Only with experts the other documents move a token to another row of a product, which rounds differently on some
    CPUs.
    """
    model = model_of(*kind)
    rounding = 1e-12 if model.config.experts else 0
    document_ids = torch.tensor([0] * 3 + [1] * 9 + [2] * 2 + [3] * 9).expand(2, -1)
    ids = tokens(2, 23)
    logits = model(ids, document_ids=document_ids)[0]
    for document in range(4):
        inside = document_ids == document
        others = torch.where(inside, ids, tokens(2, 23, seed=1))
        changed = model(others, document_ids=document_ids)[0]
        torch.testing.assert_close(changed[inside], logits[inside], atol=rounding, rtol=0)


def test_a_document_at_a_segment_border_is_read_as_if_alone():
    model = make_model()
    ids = tokens(2, 27)
    document_ids = torch.tensor([0] * 10 + [1] * 17).expand(2, -1)
    packed = model(ids, document_ids=document_ids)[0]
    torch.testing.assert_close(packed[:, :10], model(ids[:, :10])[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(packed[:, 10:], model(ids[:, 10:])[0], atol=1e-12, rtol=0)


def test_a_state_is_fixed_in_size_and_unchanged_by_reading():
    model = make_model()
    ids = tokens(1, 1003)
    early = model(ids[:, :13])[1]
    kept = {name: x.clone() for name, x in early.tensors().items()}
    late = model(ids[:, 13:], early)[1]
    assert early.size() == late.size()  # both three tokens into a segment
    assert all(torch.equal(x, kept[name]) for name, x in early.tensors().items())


def test_a_state_is_saved_loaded_and_branched(tmp_path):
    model = make_model(memory={"cell": "lstm"})
    ids = tokens(2, 30)
    _, state = model(ids[:, :12])
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert torch.equal(model(ids[:, 12:], loaded)[0], model(ids[:, 12:], state)[0])
    branched = model(ids[:, 12:].repeat_interleave(3, 0), state.select(torch.arange(len(ids)).repeat_interleave(3)))[0]
    torch.testing.assert_close(branched[::3], model(ids[:, 12:], state)[0], atol=1e-12, rtol=0)


def test_memory_can_be_reset_and_swapped():
    """Without look-back, only the memory and the store's last keys are carried; the position stays."""
    model = make_model(lookback=0)
    ids = tokens(2, 10)
    _, state = model(ids[:, :5])
    rest = ids[:, 5:]
    order = torch.tensor([1, 0])
    fresh = model(rest, replace(reset_memory(state), recent=torch.zeros_like(state.recent)))[0]
    swapped = model(rest, replace(swap_memory(state, order), recent=state.recent[:, order]))[0]
    torch.testing.assert_close(fresh, model(rest)[0], atol=1e-12, rtol=0)
    assert model(rest, reset_memory(state))[1].position.tolist() == [10, 10]
    crossed = torch.cat([ids.flip(0)[:, :5], rest], dim=1)
    torch.testing.assert_close(swapped, model(crossed)[0][:, 5:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_recent_tokens_can_be_forgotten(memory):
    """After a reset of the memory too, nothing is left; the memory alone does not depend on the recent tokens."""
    model = make_model(memory=memory)
    ids = tokens(2, 20)
    rest = ids[:, 10:]
    _, state = model(ids[:, :10])
    fresh = model(rest)[0]
    torch.testing.assert_close(model(rest, reset_memory(reset_recent(state)))[0], fresh, atol=1e-12, rtol=0)
    if model.config.memory.updated or model.config.memory.store:
        assert not torch.allclose(model(rest, reset_recent(state))[0], fresh)
    _, state = model(ids[:, :12])  # inside a segment
    m = 2 * model.config.memory.slots  # their keys and values come first, and are kept

    def noisy(layers):
        return tuple(torch.cat([x[:, :, :m], torch.randn_like(x[:, :, m:])], dim=2) for x in layers)

    stream = tuple(map(torch.randn_like, state.stream))
    other = replace(state, keys=noisy(state.keys), values=noisy(state.values), stream=stream)
    kept = model(ids[:, 12:], reset_recent(state))
    torch.testing.assert_close(model(ids[:, 12:], reset_recent(other))[0], kept[0], atol=1e-12, rtol=0)
    assert kept[1].position.tolist() == [20, 20]


@pytest.mark.parametrize("lookback", [0, 2])
def test_a_state_keeps_no_other_memory_alive(lookback):
    model = make_model(lookback=lookback, memory={"cell": "lstm"})
    _, state = model(tokens(2, 30))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.tensors().values()}
    assert sum(storages.values()) <= 1.5 * state.size()


def test_states_are_split_and_joined():
    model = make_model(memory={"cell": "lstm"})
    ids = tokens(3, 12)
    _, state = model(ids)
    again = State.join([state.rows(0, 1), state.rows(1, 2)])
    assert all(torch.equal(x, again.tensors()[name]) for name, x in state.tensors().items())
    torch.testing.assert_close(model(ids[1:], state.rows(1, 2))[0], model(ids, state)[0][1:], atol=1e-12, rtol=0)


def test_bad_calls_are_refused():
    ids = tokens(1, 7)
    with pytest.raises(ValueError, match="no tokens"):
        make_model()(ids[:, :0])
    model = make_model()
    _, state = model(ids, document_ids=torch.full_like(ids, 5))
    for bad, before in (([1, 1, 0, 0, 0, 0, 0], None), ([-1] * 7, None), ([4] * 7, state)):
        with pytest.raises(ValueError, match="non-decreasing along a row"):
            model(ids, before, torch.tensor([bad]))
    with pytest.raises(ValueError, match="max_position_embeddings = 6"):
        make_model(position="learned", max_position_embeddings=6)(ids)
    published = make_model(memory=PUBLISHED)
    with pytest.raises(ValueError, match="whole segments"):
        published(ids, published(ids)[1])


def assert_three_ways(model: RMKV, ids, tolerance):
    S = model.config.segment_length
    whole, end = model(ids)
    for step in (S, 1):
        state, parts = None, []
        for start in range(0, ids.shape[1], step):
            logits, state = model(ids[:, start : start + step], state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=tolerance, rtol=0)
        torch.testing.assert_close(state.memory, end.memory, atol=tolerance, rtol=0)
