"""The associative store returns what was written under a key, until the key gets another value."""

import pytest
import torch
from small_model import make_model

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.model import reset_memory
from rmkv_cli.model.context import make_context
from rmkv_cli.model.store import AssociativeStore, _Convolution

H, D = 2, 8


@pytest.fixture
def store():
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=H * D, num_attention_heads=H, memory=MemoryConfig(store=1))
    return AssociativeStore(config).double().requires_grad_(False)


def keys(*order):
    """Unit vectors, times 3 as length does not count, (1, H, len(order), D)."""
    return 3 * torch.eye(D, dtype=torch.float64)[list(order)].expand(1, H, -1, -1)


def values(n, seed=1):
    return torch.randn(1, H, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gates(write):
    """Gates (1, T, 2H) of tokens that write so strongly, a list of numbers from 0 to 1, and read with all strength."""
    return (
        torch.tensor([write, [1.0] * len(write)], dtype=torch.float64)
        .logit(eps=1e-15)
        .repeat_interleave(H, dim=0)
        .T[None]
    )


def make(documents, position=0, owner=0):
    """Return the context of tokens of these documents; the first token is at this position of its document."""
    documents = torch.tensor([documents])
    first = (documents == documents[:, :1]).sum()
    positions = torch.tensor([[*range(position, position + first), *range(documents.shape[1] - first)]])
    config = ModelConfig(hidden_size=H * D, num_attention_heads=H, memory=MemoryConfig(store=1), lookback=0)
    mixed = bool((documents[:, 0] != documents[:, -1]).any())
    known = documents, documents, torch.tensor([owner]), torch.tensor([owner]), positions, positions, documents.shape[1]
    return make_context(config, torch.float64, *known, ends_segment=False, mixed=mixed)


def go(store, W, q, k, v, write):
    """Read and write tokens of the document that wrote W; return what they find, (1, H, T, D), and W'."""
    T = k.shape[2]
    qk, v = torch.cat([q, k], dim=1).transpose(1, 2), v.transpose(1, 2)
    found, written = store.write_and_read(W, qk, v, gates(write), make([0] * T))
    return found.view(1, T, H, D).transpose(1, 2), written


EMPTY = torch.zeros(1, H, D, D, dtype=torch.float64)


def rms_normed(v):
    return v / v.square().mean(-1, keepdim=True).sqrt()


def test_each_key_retrieves_its_value_at_once_and_later(store):
    v = values(D)
    order = range(D)
    found, written = go(store, EMPTY, keys(*order), keys(*order), v, [1.0] * D)
    torch.testing.assert_close(found, rms_normed(v), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.nn.functional.normalize(keys(*order), dim=-1) @ written, v)
    later, _ = go(store, written, keys(5), keys(0), v[:, :, :1], [0.0])
    torch.testing.assert_close(later, rms_normed(v[:, :, 5:6]), rtol=1e-5, atol=0)


def test_a_key_s_last_value_counts_in_one_call_and_in_two(store):
    v = values(4)
    order = (2, 0, 2, 1)
    found, written = go(store, EMPTY, keys(2, 2, 2, 0), keys(*order), v, [1.0] * 4)
    torch.testing.assert_close(found, rms_normed(v[:, :, [0, 0, 2, 1]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(written[:, :, 2], v[:, :, 2])
    torch.testing.assert_close(written[:, :, 0], v[:, :, 1])
    _, later = go(store, written, keys(2), keys(2), values(1, seed=2), [1.0])
    torch.testing.assert_close(later[:, :, 2], values(1, seed=2)[:, :, 0])


def test_a_value_that_is_not_overwritten_never_fades(store):
    _, state = go(store, EMPTY, keys(0, 1), keys(0, 1), values(2), [1.0] * 2)
    _, later = go(store, state, keys(0, 1, 2), keys(0, 1, 2), values(3, seed=2), [0.0] * 3)
    torch.testing.assert_close(later, state)


def test_many_tokens_at_once_equal_one_after_the_other(store):
    q, k, v = values(7, seed=4), values(7, seed=3), values(7)
    write = torch.rand(7, generator=torch.Generator().manual_seed(0)).tolist()
    W, one_by_one = EMPTY, []
    for i in range(7):
        at = slice(i, i + 1)
        found, W = go(store, W, q[:, :, at], k[:, :, at], v[:, :, at], write[at])
        one_by_one.append(found)
    found, written = go(store, EMPTY, q, k, v, write)
    torch.testing.assert_close(found, torch.cat(one_by_one, dim=2))
    torch.testing.assert_close(written, W)


def test_a_key_tells_up_to_three_tokens_before_it_in_its_document(store):
    """With taps of 1, 10, 100 and 1000 a query spells its last tokens, and a key those before its own."""
    store.taps.copy_(torch.tensor([1.0, 10, 100, 1000])[:, None, None, None].expand_as(store.taps))
    x = torch.arange(1.0, 8, dtype=torch.float64)[None, :, None, None].expand(1, 7, 2 * H, D)
    nothing = torch.zeros(1, 2 * H, 4, D, dtype=torch.float64)
    qk, recent = store.convolve(x[:, :6], nothing, make([0, 0, 0, 0, 1, 1]))
    assert qk[0, :, 0, 0].tolist() == [1, 12, 123, 1234, 5, 56]
    assert qk[0, :, H, 0].tolist() == [0, 1, 12, 123, 0, 5]
    qk, _ = store.convolve(x[:, 6:], recent, make([1], position=2))
    assert qk[0, :, 0, 0].tolist() == [567]
    assert qk[0, :, H, 0].tolist() == [56]


def test_the_convolution_s_gradients_are_its_derivatives():
    generator = torch.Generator().manual_seed(0)
    x, taps = (torch.randn(2, n, 3, dtype=torch.float64, generator=generator) for n in (9, 5))
    taps = taps[0]
    near = torch.randint(2, (5, 2, 5, 1), generator=generator).double()
    for mask in (None, near):
        assert torch.autograd.gradcheck(
            lambda x, taps, mask=mask: _Convolution.apply(x, taps, mask), (x.requires_grad_(), taps.requires_grad_())
        )


@pytest.mark.parametrize(("layers", "stores_expected"), [(0, 0), (1, 1), (2, 2), (9, 3)])
def test_the_first_layers_have_a_store(layers, stores_expected):
    model = make_model(num_hidden_layers=3, memory={"store": layers})
    assert [block.store is not None for block in model.blocks] == [i < stores_expected for i in range(3)]
    stores = model.initial_state(1).store
    assert (0 if stores is None else len(stores)) == stores_expected


def test_a_document_s_beginning_and_a_reset_memory_read_the_start():
    ids = torch.randint(13, (1, 10), generator=torch.Generator().manual_seed(0))
    model, other = (make_model() for _ in range(2))
    _, state = model(ids[:, :5])
    for block in other.blocks:
        block.store.start.mul_(-1)
    rest = ids[:, 5:]
    assert torch.equal(model(rest, state)[0], other(rest, state)[0])
    assert not torch.allclose(model(ids[:, :5])[0], other(ids[:, :5])[0])
    assert not torch.allclose(model(rest, reset_memory(state))[0], other(rest, reset_memory(state))[0])
