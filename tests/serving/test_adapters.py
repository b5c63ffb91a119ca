"""A model with adapters: each is a model of its own name, over one copy of the base's weights."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from small_model import with_adapter
from small_run import TEXT, error_of
from small_server import running

from rmkv_cli.files import sha256
from rmkv_cli.generation import SamplingConfig, generate
from rmkv_cli.model import RMKV
from rmkv_cli.model.adapter_file import adapted_copy, save_adapter

ASK = {"prompt": TEXT, "max_tokens": 40, "temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two folders of adapters of the model."""
    place = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("poet", "critic")):
        (place / name).mkdir()
        model = with_adapter(RMKV.from_pretrained(folder), seed=seed)
        save_adapter(model, place / name, folder, sha256(folder / "model.safetensors"))
    return {name: place / name for name in ("poet", "critic")}


@pytest.fixture(scope="module")
def models(loaded, adapters):
    return {"small": loaded[0]} | {name: adapted_copy(loaded[0], path) for name, path in adapters.items()}


@pytest.fixture(scope="module")
def server(loaded, models):
    variants = {name: model for name, model in models.items() if name != "small"}
    with running(*loaded, variants=variants) as server:
        yield server


def test_they_share_the_weights_of_the_base(models):
    weight = models["small"].embedding.weight
    assert {model.embedding.weight.data_ptr() for model in models.values()} == {weight.data_ptr()}


@pytest.mark.slow
def test_each_is_a_model_that_writes_its_own_text_beside_the_others(client, loaded, models):
    assert [model.id for model in client.models.list()] == ["small", "poet", "critic"]
    assert client.models.retrieve("critic").id == "critic"
    names = ["small", "poet", "critic"] * 3

    def ask(i):
        return client.completions.create(model=names[i], seed=i, **ASK)

    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(ask, range(len(names))))
    for i, answer in enumerate(answers):
        alone = generate(models[names[i]], loaded[1], TEXT, SamplingConfig(seed=i), 40)
        assert answer.choices[0].text == "".join(alone)
        assert answer.model == names[i]
    assert len({answer.choices[0].text for answer in answers}) == len(names)


def test_a_memory_is_of_the_model_that_read_it(client, server):
    made = server.ask("POST", "/v1/memories", json={"name": "book", "text": TEXT, "model": "poet"}).json()
    assert made["model"] == "poet"
    for keep in (False, True):
        more = {"extra_body": {"memory": "book", "keep": keep}}
        assert client.completions.create(model="poet", **ASK, **more).choices[0].text
        with pytest.raises(openai.BadRequestError, match="memory 'book' was read by the model 'poet'; use that model"):
            client.completions.create(model="small", **ASK, **more)
    assert server.ask("POST", "/v1/memories/book", json={"text": TEXT}).json()["model"] == "poet"
    assert server.ask("POST", "/v1/memories", json={"name": "other", "text": TEXT}).json()["model"] == "small"


def test_an_unknown_model_is_refused_with_those_that_there_are(client, server):
    message = "there is no model 'poe'; this server has 'small', 'poet', 'critic'"
    with pytest.raises(openai.NotFoundError, match=message):
        client.completions.create(model="poe", **ASK)
    with pytest.raises(openai.NotFoundError, match=message):
        client.models.retrieve("poe")
    refused = server.ask("POST", "/v1/memories", json={"name": "b", "text": TEXT, "model": "poe"})
    assert refused.status_code == 404


def test_two_of_one_name_and_one_of_another_shape_are_refused_before_serving(
    folder, adapters, tmp_path, monkeypatch, capsys
):
    poet, ask = adapters["poet"], ("serve", "--model", folder, "--port", 0)
    line = error_of(monkeypatch, capsys, *ask, "--adapter", poet, "--adapter", poet)
    assert line == f"error: --adapter {poet}: 'poet' is the name of another model served here; rename the folder"
    line = error_of(monkeypatch, capsys, *ask, "--adapter", tmp_path)
    assert line == f"error: {tmp_path}: not an adapter folder (it has no adapter_config.json)"
