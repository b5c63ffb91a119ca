"""Compiled layers compute the same, and are compiled for few shapes, whatever the rows."""

import pytest
import torch
from small_model import make_model
from torch._dynamo.testing import CompileCounter  # compiles to PyTorch's own operations, which round as before

from rmkv_cli.training.loss import row_loss

SEGMENT, LAYERS = 8, 4


def step(model, segments):
    """Return the loss of a row after another one, and the gradients."""
    generator = torch.Generator().manual_seed(segments)
    loss, state = torch.zeros(()), model.initial_state(2)
    for document in (0, 1):
        ids = torch.randint(64, (2, segments * SEGMENT), generator=generator)
        more, state = row_loss(model, ids, ids, torch.full_like(ids, document), state.detach())
        loss = loss + more
    model.zero_grad()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # PyTorch's tracing itself asks
def test_it_is_the_same_in_four_graphs_at_most(monkeypatch):
    model = make_model(vocab_size=64, segment_length=SEGMENT, lookback=4, num_hidden_layers=LAYERS)
    model.train().requires_grad_(True)
    counter, compile_layer = CompileCounter(), torch.compile
    expected = [step(model, segments) for segments in (1, 2, 4)]
    monkeypatch.setattr(torch, "compile", lambda layer, **how: compile_layer(layer, backend=counter, **how))
    model.compile_training()
    for (loss, gradients), segments in zip(expected, (1, 2, 4), strict=True):
        compiled_loss, compiled_gradients = step(model, segments)
        assert compiled_loss == loss
        assert compiled_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(compiled_gradients[name], gradient), name
    assert 0 < counter.frame_count <= 4
