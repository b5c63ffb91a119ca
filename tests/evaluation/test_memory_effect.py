import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_documents import EOD, make_documents, random_documents
from small_model import make_model

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import memory_effect
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import train_tokenizer


def by_loops(model, first, second):
    """The three losses over what follows the first segment of two documents that lend each other their memory."""
    S = model.config.segment_length
    fresh = model.initial_state(1)
    carried = {}  # the true states before each segment
    for text in (first, second):
        carried[text] = [fresh]
        for segment in torch.tensor(text).split(S):
            carried[text].append(model(segment[None], carried[text][-1])[1])
    losses = []
    for text, other in ((first, second), (second, first)):
        own, reset, swapped = carried[text][1], carried[text][1], carried[text][1]
        shared = math.ceil(min(len(text), len(other)) / S)
        inputs, targets = torch.tensor(text).split(S), torch.tensor([*text[1:], EOD]).split(S)
        for t in range(1, shared):
            reset = replace(reset, memory=fresh.memory, cell=fresh.cell, store=fresh.store)
            lent = carried[other][t]
            swapped = replace(swapped, memory=lent.memory, cell=lent.cell, store=lent.store)
            row = []
            for state in (own, reset, swapped):
                logits, after = model(inputs[t][None], state)
                row.append((F.cross_entropy(logits[0], targets[t], reduction="none"), after))
            (_, own), (_, reset), (_, swapped) = row
            losses.append(torch.stack([loss for loss, _ in row]))
    return torch.cat(losses, dim=1)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_it_agrees_with_plain_loops(cell):
    model = make_model(memory={"cell": cell})
    documents = random_documents([4, 18, 5, 30])  # in segments of 5, two have more than one
    expected = by_loops(model, tuple(documents[1].tolist()), tuple(documents[3].tolist()))
    effect = memory_effect(model, documents)
    assert (effect.documents, effect.tokens) == (2, 13 + 15) == (2, expected.shape[1])
    assert [effect.carried, effect.reset, effect.swapped] == pytest.approx(expected.mean(dim=1).tolist(), abs=1e-6)
    assert effect.reset_cost == pytest.approx(effect.reset - effect.carried)
    assert effect.swapped_cost == pytest.approx(effect.swapped - effect.carried)
    assert len({effect.carried, effect.reset, effect.swapped}) == 3


@pytest.mark.parametrize("batch_tokens", [1, 35, 8192])
def test_the_carried_loss_is_that_of_an_ordinary_reading(batch_tokens):
    model, documents = make_model(), random_documents([20] * 7)
    effect = memory_effect(model, documents, batch_tokens=batch_tokens)
    whole = torch.tensor(np.stack([documents[i] for i in range(7)]).astype(int))
    logits, _ = model(whole)
    targets = F.pad(whole[:, 1:], (0, 1), value=EOD)
    assert effect.carried == pytest.approx(
        F.cross_entropy(logits[:, 5:].flatten(0, 1), targets[:, 5:].flatten()).item()
    )
    assert effect.tokens == 7 * 15


def test_the_memory_of_the_same_text_is_no_other_memory():
    text = random_documents([23])[0].tolist()[1:]
    effect = memory_effect(make_model(), make_documents([text] * 3))
    assert effect.swapped_cost == pytest.approx(0, abs=1e-9)
    assert effect.reset_cost != pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_a_needed_memory_shows_in_the_loss():
    """Segments of two without look-back, `EOD k | 0 k | 0 k ...`: that k follows 0 only the memory knows."""
    torch.manual_seed(0)
    keys, segments = 4, 5
    config = ModelConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        segment_length=2,
        lookback=0,
        memory=MemoryConfig(slots=2, horizon=20),
    )
    model = RMKV(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.tensor([[EOD, 3 + k, *[0, 3 + k] * segments] for k in range(keys)])
    for _ in range(120):
        logits, _ = model(rows[:, :-1])
        loss = F.cross_entropy(logits[:, 2:].flatten(0, 1), rows[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    documents = make_documents([row[1:].tolist() for row in rows], vocab_size=8)
    effect = memory_effect(model, documents)
    assert effect.reset_cost > 0.3  # half of the tokens are a guess among 4: at least ln(4) / 2 = 0.69 at the optimum
    assert effect.swapped_cost > 1  # and here they are confidently wrong
    assert model.training


def test_bits_per_byte_are_over_the_bytes_of_the_tokens_that_count():
    texts = ["Ünïcödé and words, again and again. " * 3, "Another text that has its own words. " * 3]
    tokenizer = train_tokenizer(iter(texts), 300)
    ids = [tokenizer.encode(text) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    documents = make_documents(ids, sizes=sizes, vocab_size=tokenizer.vocab_size)
    model = make_model(vocab_size=tokenizer.vocab_size)
    effect = memory_effect(model, documents, tokenizer=tokenizer)
    short = min(map(len, ids)) + 1
    shared = math.ceil(short / 5) * 5  # where the shorter one's last segment ends
    expected = sum(len(tokenizer.token_bytes(i)) for text in ids for i in text[5:shared])
    assert effect.bytes == expected
    assert effect.reset_cost_bits_per_byte == pytest.approx(effect.reset_cost * effect.tokens / math.log(2) / expected)
    without = memory_effect(model, documents)
    assert (without.bytes, without.reset_cost_bits_per_byte) == (None, None)


def test_of_a_task_only_the_answers_count():
    model = make_model()
    texts = [random_documents([n], seed=n)[0].tolist()[1:] for n in (18, 23)]
    documents = make_documents(texts, answers=[[(2, 3), (7, 9)], [(12, 13), (22, 23)]])
    effect = memory_effect(model, documents)
    assert effect.tokens == 3  # not the one in the first segment, nor the last: no other document is as long
    expected = by_loops(model, (EOD, *texts[0]), (EOD, *texts[1]))  # positions 5 to 17 of one, 5 to 19 of the other
    places = torch.tensor([6 - 5, 7 - 5, 13 + 11 - 5])
    assert [effect.carried, effect.reset, effect.swapped] == pytest.approx(expected[:, places].mean(dim=1).tolist())
    with pytest.raises(UserError, match="no answer"):
        memory_effect(model, make_documents(texts, answers=[[(1, 2)], [(1, 2)]]))


@pytest.mark.parametrize("lengths", [[3], [5, 5, 5], [40, 5], []])
def test_too_few_long_documents_are_refused(lengths):
    with pytest.raises(UserError, match=r"at least 2 documents of more than a segment \(5 tokens\)"):
        memory_effect(make_model(), random_documents(lengths) if lengths else make_documents([[]]))


def test_a_budget_that_leaves_one_document_is_refused():
    with pytest.raises(UserError, match="at least 2 documents"):
        memory_effect(make_model(), random_documents([20, 20, 20]), max_tokens=23)


def test_a_model_that_is_not_causal_is_refused():
    with pytest.raises(UserError, match="not causal"):
        memory_effect(make_model(memory={"carry": "layers", "store": 0}), random_documents([20, 20]))
