"""A decoder's steps are the model's forward pass, whatever else the batch holds."""

import pytest
import torch
from small_model import IMPORTED, MEMORIES, POSITIONS, make_model

from rmkv_cli.generation import Decoder

READ = (1, 4, 5, 12)  # of segments of 5: inside the first one, before its last token, at its end, in the third
WRITTEN = 11


def texts_of(model, lengths=READ):
    return [torch.randint(model.config.vocab_size, (1, n + WRITTEN)) for n in lengths]


def same_state(one, other):
    one, other = one.tensors(), other.tensors()
    assert one.keys() == other.keys()
    return all(one[name].shape == x.shape and torch.allclose(one[name], x, atol=1e-9) for name, x in other.items())


@pytest.mark.parametrize(
    "shape",
    [
        *({"memory": memory} for memory in MEMORIES),
        *({"position": position} for position in POSITIONS),
        {"lookback": 0},
        {"lookback": 5},
        {"intermediate_size": 0},
        {"tie_word_embeddings": False},
        *IMPORTED,
    ],
    ids=str,
)
def test_a_step_is_the_forward_pass_and_the_state_the_model_s(shape):
    model = make_model(1, **shape)
    texts = texts_of(model)
    decoder = Decoder(model, len(texts))
    for text, n in zip(texts, READ, strict=True):
        decoder.add(model.hidden(text[:, :n])[1])
    for i in range(WRITTEN):
        logits = decoder.step(torch.cat([text[:, n + i] for text, n in zip(texts, READ, strict=True)]))
        for lane, (text, n) in enumerate(zip(texts, READ, strict=True)):
            expected, state = model(text[:, : n + i + 1])
            assert torch.allclose(logits[lane].double(), expected[0, -1], atol=1e-5)
            assert same_state(decoder.state(lane), state)


def test_a_text_can_begin_with_nothing_read():
    model = make_model(2)
    decoder = Decoder(model)
    decoder.add(model.initial_state(1))
    text = torch.randint(13, (1, 7))
    for i in range(7):
        logits = decoder.step(text[:, i])
    expected, state = model(text)
    assert torch.allclose(logits[0].double(), expected[0, -1], atol=1e-5)
    assert same_state(decoder.state(0), state)


def test_a_text_continues_after_another_document():
    """The memory, the store, and the tokens of the document before are not seen."""
    model = make_model(2)
    text, documents = torch.randint(13, (1, 20)), torch.tensor([[0] * 7 + [1] * 13])
    expected, _ = model(text, document_ids=documents)
    for read in (8, 9, 10):
        decoder = Decoder(model)
        decoder.add(model.hidden(text[:, :read], document_ids=documents[:, :read])[1])
        logits = [decoder.step(text[:, i]) for i in range(read, 20)]
        assert torch.allclose(torch.stack(logits, dim=1).double(), expected[:, read:], atol=1e-5)


def test_texts_come_and_go_between_steps():
    model = make_model(3)
    texts = texts_of(model)
    decoder = Decoder(model, 2)
    at = {}  # of each text in the batch's order: tokens read
    waiting = [0, 1, 2, 3]
    finished = []
    while waiting or at:
        while waiting and len(decoder) < 2:
            text = waiting.pop(0)
            decoder.add(model.hidden(texts[text][:, : READ[text]])[1])
            at[text] = READ[text]
        order = list(at)
        logits = decoder.step(torch.cat([texts[text][:, at[text]] for text in order]))
        for lane, text in enumerate(order):
            at[text] += 1
            expected = model(texts[text][:, : at[text]])[0][0, -1]
            assert torch.allclose(logits[lane].double(), expected, atol=1e-5)
        for lane in reversed(range(len(order))):
            if at[order[lane]] == READ[order[lane]] + 5 * (order[lane] + 1) % WRITTEN + 1:
                finished.append(order[lane])
                decoder.remove(lane)
                order[lane] = order[-1]
                order.pop()
        at = {text: at[text] for text in order}
    assert sorted(finished) == [0, 1, 2, 3]


def test_states_share_no_memory_with_the_buffers():
    model = make_model(4)
    text = torch.randint(13, (1, 20))
    first = model.hidden(text[:, :6])[1]
    before = {name: x.clone() for name, x in first.tensors().items()}
    decoder = Decoder(model)
    decoder.add(first)
    decoder.step(text[:, 6])
    middle = decoder.state(0)
    kept = {name: x.clone() for name, x in middle.tensors().items()}
    for i in range(7, 20):
        decoder.step(text[:, i])
    assert all(torch.equal(x, before[name]) for name, x in first.tensors().items())
    assert all(torch.equal(x, kept[name]) for name, x in middle.tensors().items())


def test_a_text_with_nan_spoils_neither_its_neighbours_nor_its_successor():
    model = make_model(6)
    text = torch.randint(13, (1, 20))
    state = model.hidden(text[:, :6])[1]
    spoilt = state.map(lambda x, _: torch.full_like(x, torch.nan) if x.is_floating_point() else x)
    decoder = Decoder(model, 2)
    for each in (state, spoilt):
        decoder.add(each)
    for i in range(6, 10):
        logits = decoder.step(text[:, i].expand(2))
        assert torch.allclose(logits[0].double(), model(text[:, : i + 1])[0][0, -1], atol=1e-5)
        assert logits[1].isnan().all()
    decoder.remove(1)
    decoder.remove(0)
    for each in (spoilt, state):
        decoder.add(each)
    decoder.remove(0)  # so that the other one takes the place of it
    decoder.add(state)
    for i in range(6, 20):
        expected = model(text[:, : i + 1])[0][0, -1]
        for logits in decoder.step(text[:, i].expand(2)):
            assert torch.allclose(logits.double(), expected, atol=1e-5)


def test_the_buffers_hold_no_graph_of_gradients():
    """A leak would grow with each text that a server generates."""
    model = make_model(7).requires_grad_(True)
    decoder = Decoder(model)
    with torch.inference_mode():
        state = model.hidden(torch.randint(13, (1, 10)))[1]
    decoder.add(state)
    decoder.step(torch.tensor([1]))
    assert not any(buffer.requires_grad for buffer in decoder._buffers())


def test_texts_cannot_outnumber_the_lanes():
    model = make_model(5)
    decoder = Decoder(model, 1)
    decoder.add(model.initial_state(1))
    with pytest.raises(ValueError, match="all 1 lanes are in use"):
        decoder.add(model.initial_state(1))
