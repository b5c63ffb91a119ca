import itertools
import math

import pytest
import torch

from rmkv_cli.config import parse
from rmkv_cli.errors import UserError
from rmkv_cli.generation.sampling import SamplingConfig, distribution, sample

# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05, in another order.
P = torch.tensor([[0.15, 0.4, 0.05, 0.3, 0.1]], dtype=torch.float64)
NOTHING = torch.zeros(1, 5, dtype=torch.bool)


def filtered(seen=NOTHING, logits=None, **values):
    config = SamplingConfig(**{"temperature": 1, "top_p": 1} | values)
    return distribution(P.log() if logits is None else logits, config, seen)[0].tolist()


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, [0.15, 0.4, 0.05, 0.3, 0.1]),
        ({"top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"top_k": 1}, [0, 0.4, 0, 0, 0]),
        ({"top_k": 9}, [0.15, 0.4, 0.05, 0.3, 0.1]),
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
def test_the_filters_keep_what_a_hand_count_says(values, kept):
    assert filtered(**values) == pytest.approx([p / sum(kept) for p in kept], abs=1e-12)


def test_rows_are_filtered_each_on_its_own():
    two = torch.cat([P, P.flip(1)]).log()
    config = SamplingConfig(temperature=1, top_p=0.6)
    rows = distribution(two, config, NOTHING.repeat(2, 1))
    assert torch.equal(rows[0], rows[1].flip(0))


def test_temperature():
    expected = P[0] ** 2 / (P[0] ** 2).sum()
    assert filtered(temperature=0.5) == pytest.approx(expected.tolist())
    assert filtered(temperature=100) == pytest.approx([0.2] * 5, abs=0.01)
    for coldest in (1e-5, 1e-45, 1e-300):  # towards 0: the likeliest, and nowhere not a number
        assert filtered(temperature=coldest) == [0, 1, 0, 0, 0]
        assert filtered(temperature=coldest, logits=P.log().float() * 1e4) == [0, 1, 0, 0, 0]
    assert sample(P.log(), SamplingConfig(temperature=0), torch.Generator(), NOTHING).tolist() == [1]


EXTREMES = {
    "repetition_penalty": (0.01, 1.0, 100.0),
    "temperature": (0.0, 5e-324, 1e-30, 1.0, 100.0),
    "top_k": (0, 1, 2**31 - 1),
    "top_p": (5e-324, 1.0),
    "min_p": (0.0, 5e-324, 1.0),
}
LARGEST = torch.finfo(torch.float32).max
LOGITS = ([3.0, -2.0, 0.0, 1.0, -1.0], [LARGEST, -LARGEST, 0.0, LARGEST, 1.0], [0.0] * 5, [-LARGEST] * 5)


@pytest.mark.parametrize("logits", LOGITS, ids=str)
def test_every_allowed_value_gives_a_distribution_of_every_finite_logits(logits):
    """This holds for float32's largest logits as well, and where some tokens must not be drawn."""
    logits = torch.tensor([logits, logits])
    logits[:, 4] = -torch.inf
    seen = torch.tensor([[True, True, False, False, True]]).expand(2, -1)
    for values in itertools.product(*EXTREMES.values()):
        config = SamplingConfig(**dict(zip(EXTREMES, values, strict=True)))
        if config.temperature:
            probabilities = distribution(logits, config, seen)
            assert probabilities.isfinite().all()
            assert probabilities.sum(-1).tolist() == pytest.approx([1, 1])
        assert all(0 <= token < 4 for token in sample(logits, config, torch.Generator(), seen).tolist())


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_the_sign():
    logits = torch.tensor([[2.0, -1.0, 2.0, -1.0, 0.0]], dtype=torch.float64)
    seen = torch.tensor([[True, True, False, False, True]])
    expected = torch.tensor([1.0, -2.0, 2.0, -1.0, 0.0], dtype=torch.float64).softmax(0)
    assert filtered(seen, logits, repetition_penalty=2) == pytest.approx(expected.tolist())
    config = SamplingConfig(temperature=0, repetition_penalty=1.1)
    assert sample(logits, config, torch.Generator(), seen).tolist() == [2]


def test_the_draws_follow_the_distribution_and_the_seed():
    n = 20_000
    config = SamplingConfig(temperature=1, top_p=0.84)
    rows = P.log().repeat(n, 1)

    def draw(seed):
        return sample(rows, config, torch.Generator().manual_seed(seed), NOTHING.repeat(n, 1))

    share = torch.bincount(draw(0), minlength=5) / n
    for found, expected in zip(share.tolist(), filtered(top_p=0.84), strict=True):
        assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / n)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


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
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_bad_values_are_named_in_one_line(key, value):
    with pytest.raises(UserError, match=f"^sampling: {key}: should be .*$") as caught:
        parse(SamplingConfig, {key: value}, "sampling")
    assert "\n" not in str(caught.value)
