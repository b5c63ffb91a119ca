"""Experts: each token is processed by its own experts alone, and the balance evens their load."""

from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import torch.nn.functional as F
from small_model import make_model

from rmkv_cli.model import experts as experts_module

SHAPE = {"experts": 4, "expert_size": 6}


def experts_of(**shape):
    return make_model(**SHAPE | shape).blocks[0].experts.requires_grad_(True)


def by_loops(experts, n):
    """The same sum, token by token and expert by expert."""
    rows = []
    for token in n.flatten(0, 1):
        scores = torch.sigmoid(experts.router.weight @ token)
        chosen = (scores + experts.balance).argsort()[-experts.per_token :]
        rows.append(sum(scores[e] * experts.feed_forwards[e](token) for e in chosen))
    return torch.stack(rows).view_as(n)


@pytest.mark.parametrize("per_token", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 90])
def test_output_and_gradients_are_those_of_a_loop(per_token, length):
    experts = experts_of(experts_per_token=per_token)
    n = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    weights = [n, experts.router.weight, *experts.feed_forwards.parameters()]
    found, expected = (
        (y, torch.autograd.grad(y.square().sum(), weights, materialize_grads=True))
        for y in (experts(n), by_loops(experts, n))
    )
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


def test_the_load_alone_moves_the_balance():
    experts = experts_of().train()
    n = torch.randn(3, 40, 12, dtype=torch.float64)
    with torch.no_grad():
        experts.router.weight[2] = 0
        experts.balance[2] = 9  # every token chooses expert 2
    y = experts(n)
    gradients = [torch.autograd.grad(scale * y.sum(), experts.balance, retain_graph=True)[0] for scale in (1, -7)]
    assert torch.equal(*gradients)
    assert gradients[0].argmax() == 2
    assert gradients[0].sum().abs() < 1e-12
    assert 0 < gradients[0].norm() < 1e-6  # nothing beside the other gradients, whose norm is clipped at 1


def test_trained_balance_evens_the_load():
    experts = experts_of(experts_per_token=1).train()
    n = torch.randn(8, 64, 12, dtype=torch.float64) + 1  # a common direction, which some experts like more

    def largest_share():
        with torch.no_grad():
            return (F.one_hot(experts._route(n.flatten(0, 1))[1].flatten(), 4).double().mean(0)).max().item()

    before = largest_share()
    optimizer = torch.optim.AdamW([experts.balance], lr=0.01, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        experts(n).sum().backward()
        optimizer.step()
    assert before > 0.5
    assert largest_share() < 0.3


def test_reading_leaves_the_balance_alone():
    experts = experts_of().eval()
    y = experts(torch.randn(1, 5, 12, dtype=torch.float64))
    assert torch.autograd.grad(y.sum(), experts.balance, allow_unused=True) == (None,)


def test_a_copy_of_the_module_leaves_its_operations_alone():
    spec = spec_from_file_location("a-copy.of", experts_module.__file__)
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    arguments = torch.randn(4, 6), [torch.randn(5, 6) for _ in range(2)], torch.tensor([1, 2]), 2
    assert repr(copy.grouped_product) != repr(experts_module.grouped_product)
    assert torch.equal(copy.grouped_product(*arguments), experts_module.grouped_product(*arguments))
