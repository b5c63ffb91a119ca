"""Alignment: each layer on its own, given the teacher's input, is compared with the teacher's output."""

import pytest
import torch
from small_model import make_model
from torch import nn

from rmkv_cli.data.lanes import IGNORED
from rmkv_cli.training.align import row_alignment

LAYERS, T, D = 2, 17, 12
MEMORIES = [{"store": LAYERS}, {"store": 0, "cell": "lstm"}, {"store": LAYERS, "slots": 0}]


def taught(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, LAYERS, 2, T, D, generator=generator, dtype=torch.float64)
    return [*zip(x, y, strict=True)]


def rows():
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(13, (2, 2, T), generator=generator)
    targets[0, 3:9] = IGNORED
    documents = torch.tensor([0] * 7 + [1] * (T - 7)).expand(2, -1)
    return ids, targets, documents


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def attention_of_layer(model, layer, x, documents):
    """The output of a layer's attention for x, from a model that consists of this layer's attention alone."""
    one = make_model(num_hidden_layers=1, intermediate_size=0, memory=model.config.memory.model_dump())
    one.blocks[0] = model.blocks[layer]
    one.memory = nn.Parameter(model.memory[layer : layer + 1])
    one.norm = nn.Identity()
    one.norm.weight = one.memory  # the model computes in its type
    state, outputs = one.initial_state(2), []
    for start, stop in one.spans(T):
        one.embed = lambda *_, part=slice(start, stop): x[:, part]
        part = slice(start, stop)
        hidden, state = one.hidden(torch.zeros(2, stop - start, dtype=torch.int64), state, documents[:, part])
        outputs.append(hidden)
    return torch.cat(outputs, dim=1) - x


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_it_is_each_layers_distance_relative_to_the_teachers_output(memory, replay):
    model = make_model(memory=memory, intermediate_size=0)
    ids, targets, documents = rows()
    layers = taught()
    model.requires_grad_(True)
    value, state = row_alignment(model, ids, targets, documents, model.initial_state(2), layers, replay=replay)
    value.backward()
    counts, expected = targets != IGNORED, 0.0
    for number, (x, wanted) in enumerate(layers):
        y = attention_of_layer(model, number, x, documents)
        for row in range(2):
            distance, whole = ((z[row, counts[row]] ** 2).sum() for z in (y - wanted, wanted))
            expected += counts[row].sum() * distance / whole / LAYERS
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found = gradients(model)
    assert "embedding.weight" not in found
    assert not state.memory.requires_grad


def test_gradients_stay_in_their_layer():
    model = make_model(memory={"store": LAYERS}).requires_grad_(True)
    ids, targets, documents = rows()
    (x, y), (x1, y1) = taught()
    whole = []
    for changed in (y1, 2 * y1):
        layers = [(x, y), (x1, changed)]
        row_alignment(model, ids, targets, documents, model.initial_state(2), layers)[0].backward()
        whole.append(gradients(model))
        model.zero_grad()
    for name, gradient in whole[0].items():
        same = torch.equal(gradient, whole[1][name]) or name == "memory"
        assert same == (not name.startswith("blocks.1.")), name
    assert torch.equal(whole[0]["memory"][0], whole[1]["memory"][0])


def test_micro_batches_and_rows_add_up():
    model = make_model().requires_grad_(True)
    ids, targets, documents = rows()
    layers, state = taught(), model.initial_state(2)
    value, _ = row_alignment(model, ids, targets, documents, state, layers)
    value.backward()
    whole = gradients(model)
    model.zero_grad()
    parts = 0.0
    for row in (slice(0, 1), slice(1, 2)):
        its = [(x[row], y[row]) for x, y in layers]
        part, _ = row_alignment(model, ids[row], targets[row], documents[row], state.rows(row.start, 1), its)
        part.backward()
        parts += part.detach()
    torch.testing.assert_close(parts, value.detach(), rtol=1e-12, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
