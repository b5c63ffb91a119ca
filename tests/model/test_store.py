"""The associative store: what is written under a key is found under it, until the key gets another value."""

import pytest
import torch
from small_model import make_model, without_convolution

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.model import reset_memory
from rmkv_cli.model.store import AssociativeStore

H, D = 2, 8


@pytest.fixture
def store():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=H * D, num_attention_heads=H, memory=MemoryConfig(store=True))
    return AssociativeStore(config).double().requires_grad_(False)


def keys(*order):
    """Unit vectors, times 3 as length does not count, (1, H, len(order), D)."""
    return 3 * torch.eye(D, dtype=torch.float64)[list(order)].expand(1, H, -1, -1)


def values(n, seed=1):
    return torch.randn(1, H, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full(n):
    return torch.ones(1, H, n, dtype=torch.float64)


EMPTY = torch.zeros(1, H, D, D, dtype=torch.float64)


def test_each_key_finds_its_value(store):
    v = values(D)
    written = store.write(EMPTY, keys(*range(D)), v, full(D))
    torch.testing.assert_close(torch.nn.functional.normalize(keys(*range(D)), dim=-1) @ written, v)
    found = store.read(written, keys(5), full(1), torch.tensor([[True]]))
    torch.testing.assert_close(
        found, v[:, :, 5:6] / v[:, :, 5:6].square().mean(-1, keepdim=True).sqrt(), rtol=1e-5, atol=0
    )


def test_a_key_s_last_value_counts_within_a_segment_and_across(store):
    v = values(4)
    at_once = store.write(EMPTY, keys(2, 0, 2, 1), v, full(4))
    torch.testing.assert_close(at_once[:, :, 2], v[:, :, 2])
    torch.testing.assert_close(at_once[:, :, 0], v[:, :, 1])
    later = store.write(at_once, keys(2), values(1, seed=2), full(1))
    torch.testing.assert_close(later[:, :, 2], values(1, seed=2)[:, :, 0])


def test_nothing_fades_that_is_not_written_over(store):
    held = store.write(EMPTY, keys(0, 1), values(2), full(2))
    later = store.write(held, keys(0, 1, 2), values(3, seed=2), 0 * full(3))
    torch.testing.assert_close(later, held)


def test_one_segment_at_once_is_token_after_token(store):
    k, v, b = values(7, seed=3), values(7), torch.rand(1, H, 7, dtype=torch.float64)
    one_by_one = EMPTY
    for i in range(7):
        one_by_one = store.write(one_by_one, k[:, :, i : i + 1], v[:, :, i : i + 1], b[:, :, i : i + 1])
    torch.testing.assert_close(store.write(EMPTY, k, v, b), one_by_one)


def test_a_document_s_first_segment_and_a_reset_memory_read_the_start():
    ids = torch.randint(13, (1, 10), generator=torch.Generator().manual_seed(0))
    model, other = (without_convolution(make_model(lookback=0)) for _ in range(2))
    _, state = model(ids[:, :5])
    for block in other.blocks:
        block.store.start.mul_(-1)
    rest = ids[:, 5:]
    assert torch.equal(model(rest, state)[0], other(rest, state)[0])
    assert not torch.allclose(model(ids[:, :5])[0], other(ids[:, :5])[0])
    assert not torch.allclose(model(rest, reset_memory(state))[0], other(rest, reset_memory(state))[0])
