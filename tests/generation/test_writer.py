"""An RMKV as the writer of synthetic data gives the same answers as alone."""

import pytest
from small_run import save_small_model
from small_writer import a_recipe

from rmkv_cli.data.chat import pieces_of
from rmkv_cli.data.synthetic import REFUSED, generate_data
from rmkv_cli.data.synthetic.requests import make_requests
from rmkv_cli.generation import SamplingConfig, generate, local_writer

SAMPLING = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 12}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("asks_by", ["message", "text"])
def test_each_answer_is_what_the_model_writes_alone(small, tmp_path, asks_by):
    model, tokenizer = small
    recipe = a_recipe(count=7, writer={"model": "m", "asks_by": asks_by}, sampling=SAMPLING)
    write, identity = local_writer(model, tokenizer, parallel=3)
    requests, answers = make_requests(recipe, tmp_path, identity), {}
    write(requests, lambda request, answer: answers.update({request.number: answer}))
    for request in requests:
        prompt = request.prompt if asks_by == "text" else pieces_of([("user", request.prompt)])
        config = SamplingConfig(temperature=0.9, top_p=0.9, seed=request.number)
        alone = generate(model, tokenizer, prompt, config, 12, answer=asks_by == "message")
        assert answers[request.number].text == "".join(alone)
        assert answers[request.number].tokens == 12
        assert answers[request.number].finish_reason == "length"
        assert answers[request.number].prompt_tokens > 0


def test_other_weights_are_another_writer(small, tmp_path):
    _, identity = local_writer(*small, parallel=1)
    assert local_writer(*small, parallel=5)[1] == identity
    assert local_writer(*save_small_model(tmp_path, num_hidden_layers=1), parallel=1)[1] != identity


def test_a_prompt_beyond_learned_positions_is_refused(tmp_path):
    model, tokenizer = save_small_model(tmp_path, position="learned", max_position_embeddings=32)
    slots = {"topic": {"values": ["cat", "cat " * 100]}}
    recipe = a_recipe(count=12, slots=slots, sampling=SAMPLING, filters={"truncated": False}, prompt="{topic}")
    write, identity = local_writer(model, tokenizer, parallel=2)
    report = generate_data(recipe, tmp_path, tmp_path / "out.jsonl", write, identity)
    assert 0 < report.rejected[REFUSED].rows < 12
    assert "learned positions" in report.rejected[REFUSED].first
