"""Tokens are drawn for all lanes at once; each text gets those that it would get alone."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoSync

from rmkv_cli.config import parse
from rmkv_cli.errors import UserError
from rmkv_cli.generation.sampler import NONE, Sampler
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.tokenizer.special import RMKV_ROLES

FIRST = max(RMKV_ROLES.never) + 1  # of the ids that may be drawn; test vocabularies begin there
LARGEST = torch.finfo(torch.float32).max
# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05, in another order.
P = torch.tensor([[0.15, 0.4, 0.05, 0.3, 0.1]])
PLAIN = {"temperature": 1, "top_p": 1}


def with_banned(logits):
    """Return logits (n, V), and before and after them ids that are by far the likeliest, and never drawn."""
    n = len(logits)
    return torch.cat([torch.full((n, FIRST), LARGEST), logits, torch.full((n, 3), LARGEST)], dim=1)


def sampler_of(logits, configs, seen=None):
    """Return a sampler with a text at each lane, and the logits (n, V) with ids that are never drawn."""
    logits = with_banned(logits)
    sampler = Sampler(len(logits), logits.shape[1] - 3, logits[:1])
    marks = torch.zeros_like(logits, dtype=torch.bool)
    if seen is not None:
        marks[:, FIRST:-3] = seen
    for lane, config in enumerate(configs):
        sampler.put(lane, config, marks[lane : lane + 1])
    return sampler, logits


def distribution(logits, seen=None, **values):
    """Return the probabilities (n, V) by which tokens are drawn."""
    config = SamplingConfig(**PLAIN | values)
    sampler, logits = sampler_of(logits, [config] * len(logits), seen)
    weights = sampler.weights(logits)
    assert not weights[:, :FIRST].any()
    assert not weights[:, -3:].any()
    shares = weights[:, FIRST:-3].double()
    return shares / shares.sum(-1, keepdim=True)


def draw(logits, configs, seen=None):
    sampler, logits = sampler_of(logits, configs, seen)
    return sampler.draw(logits) - FIRST


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, [0.15, 0.4, 0.05, 0.3, 0.1]),
        ({"top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"top_k": 1}, [0, 0.4, 0, 0, 0]),
        ({"top_k": 99}, [0.15, 0.4, 0.05, 0.3, 0.1]),
        ({"top_p": 0.6}, [0, 0.4, 0, 0.3, 0]),  # 0.4 is not enough, 0.4 + 0.3 is
        ({"top_p": 0.39}, [0, 0.4, 0, 0, 0]),
        ({"top_p": 0.84}, [0.15, 0.4, 0, 0.3, 0]),
        ({"top_p": 1e-9}, [0, 0.4, 0, 0, 0]),  # one always stays
        ({"min_p": 0.3}, [0.15, 0.4, 0, 0.3, 0]),  # at least 0.12
        ({"min_p": 1}, [0, 0.4, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.4, 0, 0.3, 0]),  # 0.7 of the 0.85 that top_k leaves is 0.82
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.8}, [0, 0.4, 0, 0, 0]),  # 0.3 is 0.75 of 0.4
    ],
)
def test_the_filters_keep_the_tokens_counted_by_hand(values, kept):
    found = distribution(P.log(), **values)[0].tolist()
    assert found == pytest.approx([p / sum(kept) for p in kept], abs=1e-6)
    assert [p > 0 for p in found] == [p > 0 for p in kept]


def test_of_equally_likely_tokens_top_p_keeps_the_first_and_top_k_keeps_all():
    equal = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0]])
    assert distribution(equal, top_p=0.65)[0].nonzero().flatten().tolist() == [0, 1, 2, 4]
    assert distribution(equal, top_p=0.2)[0].nonzero().flatten().tolist() == [1]
    assert distribution(equal, top_k=3)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (distribution(torch.zeros(1, 1000), top_p=0.5)[0] > 0).nonzero().flatten().tolist() == list(range(500))


def filtered_in_float64(logits, seen, config, generated):
    """The definition: sort everything, and do all arithmetic in float64."""
    logits, penalty, n = logits.double(), config.repetition_penalty, config.no_repeat_ngram
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    for token in set(generated):
        logits[token] -= generated.count(token) * config.frequency_penalty + config.presence_penalty
    for i in range(len(generated) - n + 1 if n else 0):
        if generated[i : i + n - 1] == generated[len(generated) - n + 1 :]:
            logits[generated[i + n - 1]] = -torch.inf
    logits = logits / config.temperature
    if 0 < config.top_k < len(logits):
        logits[logits < logits.sort(descending=True).values[config.top_k - 1]] = -torch.inf
    p = logits.softmax(0)
    ranked, order = p.sort(descending=True, stable=True)
    p[order[ranked.cumsum(0) - ranked >= config.top_p]] = 0
    p[p < config.min_p * p.max()] = 0
    return p / p.sum()


CONFIGS = st.builds(
    SamplingConfig,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 0.7]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 1.1]),
    no_repeat_ngram=st.sampled_from([0, 1, 2, 3]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 50, 1000]),
    top_p=st.sampled_from([0.05, 0.333, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123, 0.217]),
    seed=st.integers(0, 2**63 - 1),
)


@settings(deadline=None)
@given(st.lists(CONFIGS, min_size=1, max_size=5), st.integers(0, 1000), st.booleans())
def test_the_probabilities_of_each_lane_are_those_of_float64_and_a_sort(configs, seed, coarse):
    """After a few tokens and beside texts with other settings; also where bfloat16 logits make many equally likely."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.full((len(configs), 200), -100.0)
    few[:, 7:10] = torch.randn(len(configs), 3, generator=generator)  # three tokens are drawn, again and again
    logits = 3 * torch.randn(len(configs), 200, generator=generator)
    if coarse:
        logits = logits.bfloat16().float()
    seen = torch.rand(logits.shape, generator=generator) < 0.3
    sampler, padded = sampler_of(logits, configs, seen)
    generated = torch.stack([sampler.draw(with_banned(few)) - FIRST for _ in range(6)], 1)
    seen.scatter_(1, generated, True)
    weights = sampler.weights(padded)[:, FIRST:-3].double()
    for row, marks, config, tokens, found in zip(logits, seen, configs, generated.tolist(), weights, strict=True):
        expected = filtered_in_float64(row, marks, config, tokens)
        torch.testing.assert_close(found / found.sum(), expected, atol=1e-6, rtol=0)


@settings(deadline=None)
@given(st.lists(CONFIGS | st.just(SamplingConfig(temperature=0)), min_size=2, max_size=6), st.integers(0, 1000))
def test_a_text_gets_the_same_tokens_at_any_lane_and_beside_any_texts(configs, seed):
    generator = torch.Generator().manual_seed(seed)
    steps = 3 * torch.randn(5, len(configs), 60, generator=generator)
    seen = torch.rand(len(configs), 60, generator=generator) < 0.3
    alone = []
    for lane, config in enumerate(configs):
        sampler, _ = sampler_of(steps[0, lane : lane + 1], [config], seen[lane : lane + 1])
        alone.append([int(sampler.draw(with_banned(logits[lane : lane + 1]))) for logits in steps])
    sampler, _ = sampler_of(steps[0], configs, seen)
    order, found = list(range(len(configs))), [[] for _ in configs]
    for logits in steps:  # after each step the first text leaves
        tokens = sampler.draw(with_banned(logits[order])).tolist()
        for text, token in zip(order, tokens, strict=True):
            found[text].append(token)
        if len(order) > 1:
            sampler.move(len(order) - 1, 0)
            order[0] = order.pop()
    assert [tokens[: len(own)] for tokens, own in zip(alone, found, strict=True)] == found


def test_temperature():
    expected = P[0] ** 2 / (P[0] ** 2).sum()
    assert distribution(P.log(), temperature=0.5)[0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert distribution(P.log(), temperature=100)[0].tolist() == pytest.approx([0.2] * 5, abs=0.01)
    for coldest in (1e-5, 1e-45, 1e-300):  # towards 0: the likeliest, and nowhere not a number
        assert distribution(P.log(), temperature=coldest)[0].tolist() == [0, 1, 0, 0, 0]
        assert distribution(P.log() * 1e4, temperature=coldest)[0].tolist() == [0, 1, 0, 0, 0]
    assert draw(P.log(), [SamplingConfig(temperature=0)]).tolist() == [1]


EXTREMES = {
    "repetition_penalty": (0.01, 1.0, 100.0),
    "frequency_penalty": (-2.0, 0.0, 2.0),
    "no_repeat_ngram": (0, 1),
    "temperature": (0.0, 5e-324, 1e-30, 1.0, 100.0),
    "top_k": (0, 1, 2**31 - 1),
    "top_p": (5e-324, 1.0),
    "min_p": (0.0, 5e-324, 1.0),
}
LOGITS = ([3.0, -2.0, 0.0, 1.0], [LARGEST, -LARGEST, 0.0, LARGEST], [0.0] * 4, [-LARGEST] * 4)


@pytest.mark.slow
def test_every_allowed_value_gives_a_distribution_of_every_finite_logits():
    """This holds for float32's largest logits as well."""
    lanes = list(itertools.product(LOGITS, ([True, True, False, False], [True] * 4)))
    logits, seen = (torch.tensor(x) for x in zip(*lanes, strict=True))
    for values in itertools.product(*EXTREMES.values()):
        config = SamplingConfig(**dict(zip(EXTREMES, values, strict=True)))
        sampler, padded = sampler_of(logits, [config] * len(lanes), seen)
        if config.temperature:
            weights = sampler.weights(padded)
            assert weights.amin(-1).tolist() == [0] * len(lanes)
            assert weights.sum(-1).min() > 0
        for _ in range(5):  # one more than there are tokens
            assert all(0 <= token < 4 for token in (sampler.draw(padded) - FIRST).tolist())


def test_logits_that_are_not_finite_give_no_token_and_leave_the_other_lanes_alone():
    logits = P.log().repeat(4, 1)
    logits[0, 1], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    for temperature in (0, 0.01):
        tokens = draw(logits, [SamplingConfig(temperature=temperature)] * 4)
        assert tokens.tolist() == [NONE - FIRST, 1, NONE - FIRST, NONE - FIRST]


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_the_sign():
    logits = torch.tensor([[2.0, -1.0, 2.0, -1.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    expected = torch.tensor([1.0, -2.0, 2.0, -1.0, 0.0], dtype=torch.float64).softmax(0)
    found = distribution(logits, seen, repetition_penalty=2)[0]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert draw(logits, [SamplingConfig(temperature=0, repetition_penalty=1.1)], seen).tolist() == [2]


def test_tokens_that_were_drawn_are_seen():
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    sampler, padded = sampler_of(logits, [SamplingConfig(temperature=0, repetition_penalty=2)])
    assert [int(sampler.draw(padded)) - FIRST for _ in range(4)] == [0, 1, 2, 0]


def test_the_draws_follow_the_distribution_and_the_seed():
    n = 4_000
    config = SamplingConfig(temperature=1, top_p=0.84)
    expected = distribution(P.log(), top_p=0.84)[0]

    def assert_counts(outcomes, probabilities):
        for found, p in zip(torch.bincount(outcomes, minlength=len(probabilities)), probabilities, strict=True):
            assert abs(found / len(outcomes) - p) <= 5 * math.sqrt(p * (1 - p) / len(outcomes))

    def tokens_of(seed, steps=200):
        sampler, logits = sampler_of(P.log(), [config.model_copy(update={"seed": seed})])
        return torch.cat([sampler.draw(logits) for _ in range(steps)]) - FIRST

    first = draw(P.log().repeat(n, 1), [config.model_copy(update={"seed": seed}) for seed in range(n)])
    tokens = tokens_of(0, n)
    assert_counts(first, expected)  # of many seeds
    assert_counts(tokens, expected)  # of one seed
    for outcomes in (first, tokens):  # the next one is independent of the one before
        assert_counts(5 * outcomes[:-1] + outcomes[1:], torch.outer(expected, expected).flatten())
    assert torch.equal(tokens_of(1), tokens_of(1))
    assert not torch.equal(tokens_of(1), tokens_of(2))
    assert tokens_of(2**63 - 1).min() >= 0


def test_a_token_without_weight_is_never_drawn():
    """Not even by a random number that falls on the border between two tokens."""
    sampler, _ = sampler_of(P.log(), [SamplingConfig()])
    weights = torch.zeros(1, P.shape[1] + FIRST + 3, dtype=torch.int64)
    weights[0, 2], weights[0, 5] = 1, 2
    drawn = torch.cat([sampler._drawn(weights, slice(0, 1)) for _ in range(300)])
    counts = torch.bincount(drawn, minlength=6).tolist()
    assert counts[2] + counts[5] == 300
    assert 60 < counts[2] < 140


def test_the_log_probabilities_are_the_models_own():
    logits = with_banned(P.log())
    sampler, _ = sampler_of(P.log(), [SamplingConfig(top_k=1)])
    own, ids, values = sampler.log_probabilities(logits, torch.tensor([FIRST + 3]), 2)
    expected = logits.log_softmax(-1)
    assert own.tolist() == expected[:, FIRST + 3].tolist()
    assert sorted(ids[0].tolist()) == [
        0,
        1,
    ]  # what is never drawn can be likely; ids beyond the tokenizer are not reported
    assert values.tolist() == expected[:, :2].tolist()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 100.1),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 0.0099),
        ("repetition_penalty", 100.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("no_repeat_ngram", -1),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_bad_values_are_named_in_one_line(key, value):
    with pytest.raises(UserError, match=f"^sampling: {key}: should be .*$") as caught:
        parse(SamplingConfig, {key: value}, "sampling")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        *({"temperature": 0}, {}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"top_p": 1}),
        *({"frequency_penalty": 1}, {"presence_penalty": 1}, {"no_repeat_ngram": 1}),
    ],
    ids=str,
)
def test_no_draw_waits_for_the_device(values):
    """On the meta device there is nothing to wait for: whatever reads a value raises."""
    logits = torch.zeros(4, 50, device="meta")
    sampler = Sampler(4, 48, logits[:1])
    with NoSync():
        for lane in range(4):
            sampler.put(lane, SamplingConfig(**values, seed=lane), torch.zeros(1, 50, dtype=torch.bool, device="meta"))
        sampler.put(1, SamplingConfig(temperature=0), torch.zeros(1, 50, dtype=torch.bool, device="meta"))
        assert sampler.draw(logits[1:], 1).shape == (3,)
        sampler.move(3, 0)
        tokens = sampler.draw(logits)
        own, ids, found = sampler.log_probabilities(logits, tokens, 3)
    assert (tokens.shape, own.shape, ids.shape, found.shape) == ((4,), (4,), (4, 3), (4, 3))
