"""The ratio by tokens holds after every document, through phases, and after sources are dropped."""

import json
import random as randoms

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmkv_cli.config import MixConfig
from rmkv_cli.data.balance import Balance

weights = st.lists(st.floats(0.05, 20), min_size=2, max_size=5)


def mix_of(weights, tokens=1, phases=()):
    sources = [{"kind": "noise", "name": str(i), "weight": w, "vocab": 9} for i, w in enumerate(weights)]
    return MixConfig(tokens=tokens, sources=sources, phases=phases)


def run(balance, random, longest, until):
    """Draw documents of up to `longest[i]` tokens until `tokens` tokens are taken."""
    while sum(balance.tokens) < until:
        source = balance.next()
        balance.count(source, random.randint(1, longest[source]))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(weights, st.randoms(use_true_random=False))
def test_no_source_is_ahead_by_more_than_its_last_document_or_behind_by_more_than_the_others(weights, random):
    longest = [random.choice([5, 50, 500]) for _ in weights]  # a hundredfold
    balance = Balance(mix_of(weights))
    for _ in range(300):
        total = sum(balance.tokens)
        for tokens, weight, length in zip(balance.tokens, weights, longest, strict=True):
            wanted = total * weight / sum(weights)
            assert tokens - wanted <= length + 1e-6
            assert wanted - tokens <= weight / sum(weights) * sum(longest) + 1e-6
        source = balance.next()
        balance.count(source, random.randint(1, longest[source]))


@settings(max_examples=4, deadline=None)
@given(weights, st.integers(0, 9))
def test_after_every_million_tokens_the_ratio_is_right_to_a_thousandth(weights, seed):
    random = randoms.Random(seed)
    longest = [random.choice([20, 200, 900]) for _ in weights]
    balance = Balance(mix_of(weights))
    for millions in (1, 2):
        run(balance, random, longest, millions * 1_000_000)
        achieved = [tokens / sum(balance.tokens) for tokens in balance.tokens]
        assert achieved == pytest.approx([w / sum(weights) for w in weights], abs=1e-3)


def test_each_phase_has_its_ratio_and_its_share():
    phases = [{"share": 3, "weights": {"1": 0}}, {"share": 1, "weights": {"0": 0, "1": 2}}]
    balance = Balance(mix_of([1, 1, 1], tokens=40_000, phases=phases))
    draw = randoms.Random(0)
    run(balance, draw, [9, 9, 9], 30_000)
    assert balance.tokens == pytest.approx([15_000, 0, 15_000], abs=20)
    run(balance, draw, [9, 9, 9], 40_000)
    assert balance.tokens == pytest.approx([15_000, 6_667, 18_333], abs=30)
    run(balance, draw, [9, 9, 9], 50_000)  # and so on
    assert balance.tokens == pytest.approx([15_000, 13_333, 21_667], abs=40)


def test_ratios_move_linearly_to_the_next_phase():
    phases = [{"share": 1, "moves": True, "weights": {"1": 0}}, {"share": 1, "weights": {"0": 0}}]
    balance = Balance(mix_of([1, 1], tokens=20_000, phases=phases))
    assert [balance.shares(t)[0] for t in (0, 2_500, 5_000, 9_999, 10_000)] == pytest.approx([1, 0.75, 0.5, 1e-4, 0])
    run(balance, randoms.Random(0), [9, 9], 5_000)
    assert balance.tokens == pytest.approx([3_750, 1_250], abs=20)  # the mean share of the first half is 3/4
    run(balance, randoms.Random(0), [9, 9], 10_000)
    assert balance.tokens == pytest.approx([5_000, 5_000], abs=20)


def test_a_dropped_source_leaves_its_share_to_the_others_in_their_ratio():
    balance = Balance(mix_of([2, 1, 1]))
    run(balance, randoms.Random(0), [9, 9, 9], 4_000)
    balance.drop(0)
    run(balance, randoms.Random(1), [9, 9, 9], 8_000)
    assert balance.tokens == pytest.approx([2_000, 3_000, 3_000], abs=20)
    balance.drop(1)
    balance.drop(2)
    assert balance.next() is None


@settings(max_examples=50, deadline=None)
@given(weights, st.randoms(use_true_random=False), st.integers(0, 500))
def test_a_restored_state_continues_exactly(weights, random, until):
    longest = [30] * len(weights)
    one, other = Balance(mix_of(weights)), Balance(mix_of(weights))
    run(one, random, longest, until)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(50):
        assert one.next() == other.next()
        length = random.randint(1, 30)
        one.count(one.next(), length)
        other.count(other.next(), length)


def test_a_phase_ends_when_its_sources_are_exhausted():
    phases = [{"share": 1, "weights": {"1": 0}}, {"share": 1, "weights": {"0": 0}}]
    balance = Balance(mix_of([1, 1], tokens=1000, phases=phases))
    balance.count(0, 10)
    balance.drop(0)
    assert balance.next() == 1
    balance.drop(1)
    assert balance.next() is None
