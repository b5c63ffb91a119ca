"""LoRA: what an adapter changes, which layers it is on, and how it is merged."""

import pytest
import torch
from small_model import MEMORIES, make_model, with_adapter

from rmkv_cli.errors import UserError
from rmkv_cli.model.adapters import ADAPTER_MARK, adapted, attach, blank_copy, merged, select

IDS = torch.randint(13, (2, 23), generator=torch.Generator().manual_seed(0))
LAYERS = ["attention.qkv", "attention.out", "feed_forward.gate", "feed_forward.up", "feed_forward.down"]


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_a_new_adapter_changes_nothing(memory):
    model = make_model(memory=memory)
    before = model(IDS)[0]
    attach(model, select(model, ()), 2, 3.0)
    torch.testing.assert_close(model(IDS)[0], before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_merged_weights_give_the_adapted_model_s_logits(memory):
    plain = make_model(memory=memory)
    model = with_adapter(make_model(memory=memory))
    logits = model(IDS)[0]
    assert not torch.allclose(logits, plain(IDS)[0], atol=1e-3)
    alone = merged(model)
    assert alone.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(alone(IDS)[0], logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("memory", "cell"),
    [({"cell": "gru"}, ["cell.cell"]), ({"cell": "minimal"}, ["cell.cell.linear"]), ({"slots": 0}, [])],
    ids=str,
)
def test_without_targets_an_adapter_is_on_all_linear_layers_and_cells(memory, cell):
    model = make_model(memory={"store": 1} | memory, tie_word_embeddings=False)
    found = {f"blocks.{i}.{layer}" for i in (0, 1) for layer in (*LAYERS, *cell)} | {"blocks.0.store.gates"}
    assert set(select(model, ())) == found


def test_every_one_of_its_parameters_gets_a_gradient():
    model = with_adapter(make_model())
    named = {name: x.requires_grad_(True) for name, x in model.named_parameters() if ADAPTER_MARK in name}
    model(IDS)[0].logsumexp(-1).sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in named.values())


def test_targets_are_names_or_their_ends():
    model = make_model()
    assert select(model, ["qkv", "blocks.1.feed_forward.up"]) == [
        *("blocks.0.attention.qkv", "blocks.1.attention.qkv", "blocks.1.feed_forward.up"),
    ]
    assert select(model, ["cell.cell"]) == ["blocks.0.cell.cell", "blocks.1.cell.cell"]


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("q_proj", "; the layers are attention.out, attention.qkv, cell.cell, "),
        ("attention.qvk", "; did you mean 'attention.qkv'?"),
        ("gat", "; did you mean 'gate'?"),
        ("kv", "; did you mean 'qkv'?"),
    ],
)
def test_a_target_that_fits_nothing_is_an_error_with_the_nearest_name(target, hint):
    with pytest.raises(UserError) as error:
        select(make_model(), ["out", target])
    assert str(error.value).startswith(f"train.adapter.targets: '{target}' matches no linear layer or cell{hint}")


def test_a_blank_copy_has_the_same_layers_and_no_weights():
    model = with_adapter(make_model(), ["qkv", "cell.cell"], rank=3, alpha=5.0)
    copy = blank_copy(model)
    assert {name: x.shape for name, x in copy.state_dict().items()} == {
        name: x.shape for name, x in model.state_dict().items()
    }
    assert all(x.is_meta for x in copy.parameters())
    assert {name: (layer.rank, layer.alpha) for name, layer in adapted(copy)} == {
        f"blocks.{i}.{layer}": (3, 5.0) for i in (0, 1) for layer in ("attention.qkv", "cell.cell")
    }
