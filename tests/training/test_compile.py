"""A compiled segment computes the same in one graph, and is compiled for few shapes, whatever the rows."""

import pytest
import torch
from small_model import IMPORTED, make_model, with_adapter
from torch._dynamo.testing import CompileCounter  # compiles to PyTorch's own operations, which round as before

from rmkv_cli.training.loss import compiled_segment, row_loss

SEGMENT = 8
ROWS = [(1, 0), (2, 0), (4, 0), (2, 5), (4, 11)]  # segments, and where a document ends inside the row


def step(model, rows, segments, border, segment=None):
    """Return the loss of a row after another one, and the gradients."""
    generator = torch.Generator().manual_seed(segments)
    loss, state = torch.zeros(()), model.initial_state(4)
    for document in (0, 2):
        ids = torch.randint(64, (rows, segments * SEGMENT), generator=generator)
        documents = torch.full_like(ids, document)
        documents[:, border:] += border > 0
        more, state = row_loss(model, ids, ids, documents, state.rows(0, rows), segment=segment)
        loss = loss + more
    model.zero_grad()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# PyTorch's tracing itself asks for these gradients, and makes such an object.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("shape", "rows", "adapted"),
    [
        ({"memory": {"store": 1}}, 2, False),
        ({"memory": {"store": 0}, "position": "sinusoidal"}, 2, False),
        ({"memory": {"cell": "lstm"}, "position": "learned"}, 1, True),
        (IMPORTED[-1], 2, False),
        ({"memory": {"cell": "lstm"}, "position": "learned"}, 1, False),
    ],
    ids=str,
)
def test_it_is_the_same_in_four_graphs_at_most(shape, rows, adapted, monkeypatch):
    shape = {"vocab_size": 64, "num_hidden_layers": 2} | shape | {"segment_length": SEGMENT, "lookback": 4}
    model = make_model(**shape)
    if adapted:
        with_adapter(model)
    model.train().requires_grad_(True)
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_graph = torch.compile
    monkeypatch.setattr(torch, "compile", lambda segment, **how: compile_graph(segment, backend=counter, **how))
    compiled = compiled_segment(model)
    for row in ROWS:
        loss, gradients = step(model, rows, *row)
        compiled_loss, compiled_gradients = step(model, rows, *row, compiled)
        assert compiled_loss == loss
        assert compiled_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(compiled_gradients[name], gradient), name
    assert 0 < counter.frame_count <= 4
