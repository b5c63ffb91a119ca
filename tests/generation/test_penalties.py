"""Penalties and forbidden n-grams of generated tokens, against their definitions elsewhere."""

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from rmkv_cli.generation.sampler import Sampler
from rmkv_cli.generation.sampling import SamplingConfig

V = 5


def sampler_of(*configs):
    sampler = Sampler(len(configs), V, torch.zeros(1, V), never=())
    for lane, config in enumerate(configs):
        sampler.put(lane, config, torch.zeros(1, V, dtype=torch.bool))
    return sampler


def drawn(sampler, tokens, lane=0):
    """Have a lane draw these tokens; the logits leave it no choice, whatever the penalties."""
    for token in tokens:
        logits = torch.full((1, V), -1e30)
        logits[0, token] = 1e30
        assert int(sampler.draw(logits, lane)) == token


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_forbidden_tokens_are_those_of_transformers(n):
    torch.manual_seed(n)
    processor, sampler = NoRepeatNGramLogitsProcessor(n), sampler_of(SamplingConfig(no_repeat_ngram=n, temperature=1))
    generated, forbidden = [], 0
    for _ in range(40):
        logits = torch.randn(1, V)
        expected = processor(torch.tensor([generated], dtype=torch.int64), logits).isfinite()
        if not expected.any():  # every token is forbidden, for which transformers has no answer
            break
        generated.append(int(sampler.draw(logits)))
        assert expected[0, generated[-1]]
        forbidden += int((~expected).sum())
    assert forbidden


def test_a_ban_that_leaves_no_token_is_lifted():
    sampler = sampler_of(SamplingConfig(no_repeat_ngram=1, temperature=0))
    logits = torch.arange(V, dtype=torch.float32)[None]
    assert [int(sampler.draw(logits)) for _ in range(V + 2)] == [4, 3, 2, 1, 0, 4, 4]


def test_the_penalties_are_subtracted_as_the_openai_protocol_says():
    config = SamplingConfig(frequency_penalty=0.5, presence_penalty=-0.25, temperature=1, top_p=1)
    sampler, logits = sampler_of(config), torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0]])
    drawn(sampler, [1, 4, 1, 1])
    counts = torch.tensor([[0, 3, 0, 0, 1]])
    expected = (logits - counts * 0.5 - (counts > 0) * -0.25).softmax(-1)
    weights = sampler.weights(logits).double()
    torch.testing.assert_close(weights / weights.sum(), expected.double(), atol=1e-6, rtol=0)


def test_the_prompt_does_not_count():
    config = SamplingConfig(frequency_penalty=2, presence_penalty=2, no_repeat_ngram=1, temperature=0)
    sampler = Sampler(1, V, torch.zeros(1, V), never=())
    sampler.put(0, config, torch.ones(1, V, dtype=torch.bool))
    assert [int(sampler.draw(torch.arange(V, dtype=torch.float32)[None])) for _ in range(2)] == [4, 3]


def test_a_new_text_in_a_lane_starts_from_nothing():
    config = SamplingConfig(frequency_penalty=2, no_repeat_ngram=1, temperature=0)
    sampler, logits = sampler_of(config, config), torch.arange(V, dtype=torch.float32)[None]
    drawn(sampler, [4, 3])
    drawn(sampler, [2], lane=1)
    sampler.move(1, 0)
    assert int(sampler.draw(logits)) == 4
    sampler.put(0, config, torch.zeros(1, V, dtype=torch.bool))
    assert int(sampler.draw(logits)) == 4
