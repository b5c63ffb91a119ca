"""The model agrees with the plain-loop reference for every choice in the config."""

import itertools

import numpy as np
import pytest
import torch
from reference import Reference
from small_model import CELLS, EVERY, IMPORTED, MEMORIES, POSITIONS, make_model


def random_tokens(length, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 13, (1, length)))


def segments(length, S=5):
    return [S] * (length // S) + ([length % S] if length % S else [])


@pytest.mark.parametrize(("memory", "position"), list(itertools.product(MEMORIES, POSITIONS)), ids=str)
def test_agrees_with_the_reference(memory, position):
    model = make_model(position=position, memory=memory)
    ids = random_tokens(18)
    expected = Reference(model).read(ids[0].tolist(), segments(18))
    np.testing.assert_allclose(model(ids)[0][0], expected, atol=1e-11)


@pytest.mark.parametrize(
    "shape",
    [
        {"lookback": 0},
        {"lookback": 5},
        {"intermediate_size": 0},
        {"segment_length": 1, "lookback": 1},
        {"tie_word_embeddings": False},
        *IMPORTED,
    ],
    ids=str,
)
def test_agrees_in_every_shape(shape):
    model = make_model(**shape)
    ids = random_tokens(13)
    expected = Reference(model).read(ids[0].tolist(), segments(13, model.config.segment_length))
    np.testing.assert_allclose(model(ids)[0][0], expected, atol=1e-11)


@pytest.mark.parametrize(("cell", "update"), list(itertools.product(CELLS, ("carry", "published"))))
def test_published_wiring_agrees_with_the_reference(cell, update):
    model = make_model(num_hidden_layers=3, memory={"cell": cell, "update": update, "carry": "layers", "store": 0})
    ids = random_tokens(18)
    expected = Reference(model).read(ids[0].tolist(), segments(18))
    np.testing.assert_allclose(model(ids)[0][0], expected, atol=1e-11)


@pytest.mark.parametrize(
    "shape", [*({"memory": m, "position": p, "lookback": n} for m, p, n in EVERY), *IMPORTED], ids=str
)
def test_packed_documents_give_what_the_reference_gives_for_each_alone(shape):
    """Rows of 25 tokens, segments of 5: documents begin and end inside segments, at their borders, and span several."""
    model = make_model(**shape)
    ids = random_tokens(25)
    document_ids = torch.tensor([[0] * 2 + [1] * 1 + [2] * 7 + [7] * 12 + [8] * 3])
    logits = model(ids, document_ids=document_ids)[0][0]
    reference = Reference(model)
    alone = [(0, 2, [2]), (2, 3, [1]), (3, 10, [2, 5]), (10, 22, [5, 5, 2]), (22, 25, [3])]
    for start, stop, lengths in alone:
        expected = reference.read(ids[0, start:stop].tolist(), lengths)
        np.testing.assert_allclose(logits[start:stop], expected, atol=1e-11, err_msg=f"tokens {start} to {stop}")


@pytest.mark.parametrize(("length", "shape"), [(64, {}), (150, {}), (192, {}), (150, IMPORTED[1])])
def test_segments_of_several_chunks_agree_with_the_reference(length, shape):
    model = make_model(segment_length=length, lookback=7, **shape)
    ids = random_tokens(2 * length - 9)
    document_ids = torch.tensor([[0] * (length - 20) + [1] * 30 + [2] * (length - 19)])
    logits = model(ids, document_ids=document_ids)[0][0]
    reference = Reference(model)
    for start, stop, lengths in ((0, length - 20, [length - 20]), (length - 20, length + 10, [20, 10])):
        expected = reference.read(ids[0, start:stop].tolist(), lengths)
        np.testing.assert_allclose(logits[start:stop], expected, atol=1e-11)
    expected = reference.read(ids[0].tolist(), segments(len(ids[0]), length))
    np.testing.assert_allclose(model(ids)[0][0], expected, atol=1e-11)
