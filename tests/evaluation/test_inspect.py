"""The measurements of the memory match the model's computation."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_documents import EOD, make_documents, random_documents
from small_model import CELLS, make_model, with_adapter

from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import inspect_memory
from rmkv_cli.evaluation.inspect import TOP
from rmkv_cli.evaluation.watch import attention_weights, effective_rank, keep_gate, watch
from rmkv_cli.model import reset_memory
from rmkv_cli.model.adapters import merged
from rmkv_cli.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(iter(["the cat"]), 263)
NINE = math.log(9)  # sigmoid of it is 0.9
HALF_LIFE = math.log(2) / -math.log(0.9)  # 6.58 segments


def inspect(model, documents, **rest):
    report = inspect_memory(model, documents, TOKENIZER, **rest)
    json.dumps(asdict(report), allow_nan=False)
    return report


def test_effective_ranks():
    assert effective_rank(torch.eye(4)).item() == pytest.approx(4)
    assert effective_rank(torch.ones(3, 5)).item() == pytest.approx(1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, -1.0]))).item() == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.stack([torch.zeros(2, 2), torch.eye(2)])).tolist() == pytest.approx([0, 2])


@pytest.mark.parametrize("kind", CELLS)
def test_the_keep_gate_is_what_the_cell_keeps_when_its_candidate_is_nothing(kind):
    cell = make_model(memory={"cell": kind}).blocks[0].cell
    with torch.no_grad():
        if kind == "minimal":
            cell.cell.linear.weight[12:] = cell.cell.linear.bias[12:] = 0
        else:
            candidate = slice(24, 36)  # the third of torch's gates in both
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(cell.cell, name)[candidate] = 0
    x, hidden, state = torch.randn(3, 1, 3, 12, dtype=torch.float64)
    after, state_after = cell(x, hidden, state if kind == "lstm" else None)
    kept = state_after / state if kind == "lstm" else after / hidden
    torch.testing.assert_close(keep_gate(cell, x[0], hidden[0]).sigmoid(), kept[0])


@pytest.mark.parametrize("kind", CELLS)
def test_an_adapted_cell_has_the_keep_gate_of_the_merged_one(kind):
    model = with_adapter(make_model(memory={"cell": kind}))
    x, hidden = torch.randn(2, 3, 12, dtype=torch.float64)
    found, expected = (keep_gate(each.blocks[0].cell, x, hidden) for each in (model, merged(model)))
    torch.testing.assert_close(found, expected)


def test_attention_is_that_of_the_model():
    model = make_model()
    calls = []
    for module in (model.blocks[0].attention, model.blocks[0].pooling):
        module.register_forward_hook(lambda module, given, output: calls.append((module, given, output)))
    model(torch.randint(3, 13, (1, 15)))
    slots = [calls[i - 1] for i, (module, *_) in enumerate(calls) if module is model.blocks[0].pooling]
    assert len(slots) == 3
    for _, (q, k, v, mask), output in slots:
        weights = attention_weights(q[0], k[0], mask[0]).double()
        torch.testing.assert_close((weights @ v[0]).transpose(0, 1).flatten(1), output[0], atol=1e-5, rtol=0)
    for module, (x, mask, *_), output in calls:
        if module is model.blocks[0].pooling:
            weights = attention_weights(module.queries, x[0], mask[0]).double()
            torch.testing.assert_close(weights @ x[0], output[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [{}, {"num_attention_heads": 6, "num_key_value_heads": 2}], ids=str)
def test_the_measurements_add_up_and_leave_the_model_unchanged(shape):
    model = make_model(**shape)
    ids = torch.randint(3, 13, (2, 10))
    expected = model(ids)[0]
    with watch(model, 13) as watched:
        state = None
        for segment in ids.split(5, dim=1):
            watched.read(segment[0])
            logits, state = model(segment, state)
            watched.close(state)
    torch.testing.assert_close(logits, expected[:, 5:], atol=1e-12, rtol=0)
    assert watched.segments == 2
    assert watched.counts.tolist() == np.bincount(ids[0].numpy(), minlength=13).tolist()
    torch.testing.assert_close(watched.pooled.sum(-1), torch.full((2, 3), 2.0))
    torch.testing.assert_close(watched.attended.sum(-1) + watched.on_memory, torch.full((2, 3), 2.0))
    assert (watched.on_memory > 0).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("kind", "features"), [("gru", 0), ("lstm", 0), ("minimal", 2)])
def test_half_lives(kind, features):
    model = make_model(memory={"cell": kind, "store_features": features})
    directions = 4 * (2 * features or 1)
    for block in model.blocks:
        cell, keep = block.cell.cell, slice(12, 24)
        if kind == "minimal":
            cell.linear.weight.data[:12], cell.linear.bias.data[:12] = 0, NINE
        else:
            for part in (cell.weight_ih, cell.weight_hh, cell.bias_ih):
                part.data[keep] = 0
            cell.bias_hh.data[keep] = NINE
        block.store.gates.weight.data[:] = 0
        block.store.gates.bias.data[:] = -torch.tensor(0.9 ** (directions / 5)).logit()  # 5 tokens a segment write
    report = inspect(model, random_documents([13, 21]))
    for layer in report.layers:
        assert layer.store.half_life == pytest.approx([HALF_LIFE] * 3)
        for slot in layer.slots:
            assert (slot.half_life, slot.half_life_of_longest) == pytest.approx((HALF_LIFE, HALF_LIFE))


def test_a_query_that_looks_for_one_token_is_seen_to():
    model = make_model()
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(13, 12))
        model.blocks[0].attention.out.weight.zero_()  # what the pooling reads is the embedding
        model.blocks[0].pooling.queries.copy_(200 * torch.eye(12)[[7, 8, 9]])
    documents = make_documents([[3, 7, 8, 9, 7, 4, 8, 9, 7, 5, 6, 4]])  # segments of 5 with the EOD: 2 and a bit
    report = inspect(model, documents)
    assert report.segments == 2
    names = [TOKENIZER.token_bytes(i).decode() for i in (7, 8, 9)]
    for slot, name in zip(report.layers[0].slots, names, strict=True):
        assert slot.pools[0].token == name
        assert slot.pools[0].mass == pytest.approx(1, abs=1e-3)
        assert slot.pools[0].share == pytest.approx({7: 3, 8: 2, 9: 2}[7 + names.index(name)] / 10)
        assert len(slot.pools) == len(slot.attends) == TOP


@pytest.mark.parametrize("memory", [{}, {"cell": "lstm"}, {"slots": 0}, {"store": 0}, {"store": 1}, {"update": "none"}])
def test_costs_agree_with_plain_loops(memory):
    model = make_model(memory=memory)
    documents = random_documents([4, 17, 12])
    fresh = model.initial_state(1)

    def without_layer(i):
        def forget(state):
            changed = {}
            for name in ("memory", "cell", "store"):
                if getattr(state, name) is not None and i < len(getattr(state, name)):
                    changed[name] = getattr(state, name).clone()
                    changed[name][i] = getattr(fresh, name)[i]
            return replace(state, **changed)

        return forget

    def loss(forget):
        losses = []
        for n in (1, 2):
            ids = torch.tensor([*documents[n].tolist(), EOD])
            state = model(ids[None, :5])[1]
            for start in range(5, len(ids) - 1, 5):
                stop = min(start + 5, len(ids) - 1)
                logits, state = model(ids[None, start:stop], forget(state))
                losses.append(F.cross_entropy(logits[0], ids[start + 1 : stop + 1], reduction="none"))
        return torch.cat(losses).mean().item()

    report = inspect(model, documents)
    assert (report.documents, report.segments, report.tokens) == (2, 5, 12 + 7)
    own = loss(lambda state: state)
    assert report.loss == pytest.approx(own, abs=1e-5)
    assert report.cost_without == pytest.approx(loss(reset_memory) - own, abs=1e-5)
    costs = [loss(without_layer(i)) - own for i in range(2)]
    assert [layer.cost_without for layer in report.layers] == pytest.approx(costs, abs=1e-5)
    assert abs(report.cost_without) > 1e-4


def test_memories_without_slots_without_store_and_with_neither():
    documents = random_documents([16])
    none = inspect(make_model(memory={"slots": 0, "store": 0}), documents)
    for layer in none.layers:
        assert (layer.slots, layer.effective_rank, layer.store) == ([], None, None)
        assert layer.cost_without == pytest.approx(0, abs=1e-9)
    fixed = inspect(make_model(memory={"update": "none", "store": 0}), documents)
    assert [layer.slots for layer in fixed.layers] == [[], []]
    assert 1 < fixed.layers[0].effective_rank <= 3
    assert fixed.cost_without == pytest.approx(0, abs=1e-9)
    stores = inspect(make_model(memory={"slots": 0}), documents)
    assert len(stores.layers[0].store.half_life) == len(stores.layers[0].store.effective_rank) == 3
    assert all(1 <= rank <= 4 for rank in stores.layers[0].store.effective_rank)
    published = inspect(make_model(memory={"update": "published"}), documents).layers[0].slots[0]
    assert (published.half_life, published.half_life_of_longest) == (None, None)
    assert published.pools


def test_the_rank_of_slots_that_are_all_alike_is_one():
    model = make_model(memory={"store": 0})
    model.memory.data[:] = model.memory[:, :1].clone()
    for block in model.blocks:
        block.pooling.queries.data[:] = block.pooling.queries[:1].clone()
    report = inspect(model, random_documents([16]))
    assert [layer.effective_rank for layer in report.layers] == pytest.approx([1, 1])


def test_a_budget_bounds_what_is_read():
    advanced = []
    report = inspect(make_model(), random_documents([100] * 3), max_tokens=42, advance=advanced.append)
    assert (report.tokens, report.segments, sum(advanced)) == (37, 8, 42)


def test_models_and_texts_that_cannot_be_inspected_are_refused():
    with pytest.raises(UserError, match=r"more than a segment \(5 tokens\)"):
        inspect(make_model(), random_documents([5, 4]))
    with pytest.raises(UserError, match=r"more than a segment \(5 tokens\)"):
        inspect(make_model(), random_documents([50]), max_tokens=5)
    with pytest.raises(UserError, match="not causal"):
        inspect(make_model(memory={"carry": "layers", "store": 0}), random_documents([50]))
