"""A fault ends only its own job: all other requests are answered, and nobody is left waiting."""

import itertools
import json
import threading
from dataclasses import replace

import pytest
import torch
from small_server import all_texts_freed, running, wait_for

from rmkv_cli.generation import Decoder, SamplingConfig, generate
from rmkv_cli.generation.sampler import Sampler
from rmkv_cli.generation.stop import StopStrings
from rmkv_cli.serving import memories as memories_module
from rmkv_cli.serving.choice import Choice

CAT = {"prompt": "the cat", "max_tokens": 40, "seed": 3}
BROKEN_SEED, BROKEN_STOP = 666, "raise"
TEXT = "the dog sat on the log. "
ERRORS = (MemoryError, OSError, RuntimeError)  # classes: an instance would keep its traceback's frames


@pytest.fixture
def server(loaded):
    """A fresh server. At the end all its lanes and names must be free again."""
    with running(*loaded, lanes=4) as server:
        yield server
        assert server.unfinished() == 0
        assert server.ask("GET", "/health").status_code == 200


@pytest.fixture
def expected(loaded):
    def write(**asked):
        generation = generate(*loaded, asked["prompt"], SamplingConfig(seed=asked["seed"]), asked["max_tokens"])
        return "".join(generation)

    return write


def complete(server, **body):
    return server.ask("POST", "/v1/completions", json=body)


@pytest.fixture(params=["logits", "stop", "score"])
def broken(request, server, monkeypatch):
    """A valid request whose text fails while it is generated."""
    asked = CAT | {"seed": BROKEN_SEED - 1, "n": 2}  # the second of the two
    if request.param == "logits":
        server.ask("POST", "/v1/memories", json={"name": "spoilt", "text": TEXT})
        memories = server.service.memories
        state = memories.get("spoilt").state
        spoilt = tuple(torch.full_like(x, torch.nan) for x in state.keys)
        memory = memories._memories["spoilt"]
        prompt = replace(memory.prompt, state=replace(state, keys=spoilt))
        memories._memories["spoilt"] = replace(memory, prompt=prompt)
        return asked | {"prompt": "", "memory": "spoilt"}

    def breaking(function, when):
        calls = itertools.count(1)

        def call(*arguments):
            if when(*arguments) and not next(calls) % 3:
                raise RuntimeError("a fault")
            return function(*arguments)

        return call

    if request.param == "stop":
        asked["stop"] = [BROKEN_STOP]
        watched = breaking(StopStrings.push, lambda stops, piece: stops._stops == (BROKEN_STOP,))
        monkeypatch.setattr(StopStrings, "push", watched)
    if request.param == "score":
        asked["logprobs"] = 5
        monkeypatch.setattr(Choice, "said", breaking(Choice.said, lambda text, _: text.scores == 5))
    return asked


class TestAText:
    @pytest.mark.slow
    def test_ends_alone(self, server, broken, expected, capsys):
        others = [CAT | {"seed": seed, "max_tokens": 200} for seed in (1, 2)]
        texts = {}

        def ask(other):
            texts[other["seed"]] = complete(server, **other).json()["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(other,)) for other in others]
        for thread in threads:
            thread.start()
        for _ in range(3):  # the lanes that it leaves are as good as new
            answer = complete(server, **broken)
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal_error"
            assert complete(server, **CAT).json()["choices"][0]["text"] == expected(**CAT)
        for thread in threads:
            thread.join()
        assert texts == {other["seed"]: expected(**other) for other in others}
        assert "Traceback" in capsys.readouterr().err

    def test_tells_it_as_the_last_event_of_a_stream(self, server, broken):
        answer = complete(server, **broken, stream=True)
        *events, last, nothing = answer.text.split("\n\n")
        assert events
        assert nothing == ""
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"

    def test_is_let_go_of_at_once(self, server, broken):
        """A fault's traceback refers to the text, so the text must not keep the fault."""
        with all_texts_freed():
            assert complete(server, **broken).status_code == 500

    def test_leaves_the_memory_as_it_was_that_was_to_keep_it(self, server, broken):
        made = server.ask("POST", "/v1/memories", json={"name": "dogs", "text": TEXT}).json()
        asked = broken | {"n": 1, "seed": BROKEN_SEED, "keep": True, "memory": broken.get("memory", "dogs")}
        for _ in range(2):  # the name is not locked
            assert complete(server, **asked).status_code == 500
        assert server.ask("GET", "/v1/memories/dogs").json() == made
        assert server.ask("POST", "/v1/memories/dogs", json={"text": TEXT}).status_code == 200


def test_values_at_their_bounds_are_answered_and_stop_nobody(server, expected):
    extremes = [
        {"repetition_penalty": 0.01, "temperature": 0},
        {"repetition_penalty": 0.01, "temperature": 1e-300},
        {"repetition_penalty": 100, "temperature": 100, "top_p": 1},
        {"top_p": 5e-324, "min_p": 1, "top_k": 2**31 - 1},
        {"temperature": 5e-324, "min_p": 5e-324, "seed": 2**63 - 1},
    ]
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(complete(server, **CAT).json()["choices"][0]["text"]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for extreme in extremes:
        assert complete(server, **CAT | extreme).status_code == 200
    for thread in threads:
        thread.join()
    assert set(answers) == {expected(**CAT)}


@pytest.mark.parametrize("error", ERRORS)
class TestKeeping:
    """A reading is stored at the end. If that fails, the client gets an error, and the name is free again."""

    def requests(self):
        keep = {"memory": "dogs", "keep": True}
        message = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 5}
        yield "/v1/memories", {"name": "cats", "text": TEXT}
        yield "/v1/memories/dogs", {"text": TEXT}
        yield "/v1/completions", CAT | keep
        yield "/v1/chat/completions", message | keep

    def test_a_failure_is_reported(self, server, monkeypatch, error):
        server.ask("POST", "/v1/memories", json={"name": "dogs", "text": TEXT})
        before = server.ask("GET", "/v1/memories").json()

        def failing(*_, **__):
            raise error(28, "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(memories_module, "replace", failing)
            for path, body in self.requests():
                assert server.ask("POST", path, json=body).status_code == 500
            events = complete(server, **CAT, memory="dogs", keep=True, stream=True).text.split("\n\n")
            assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"
            assert server.unfinished() == 0
        assert server.ask("GET", "/v1/memories").json() == before
        for path, body in self.requests():
            assert server.ask("POST", path, json=body).status_code in (200, 201)

    def test_a_job_that_is_not_taken_in_frees_its_name(self, server, monkeypatch, error):
        server.ask("POST", "/v1/memories", json={"name": "dogs", "text": TEXT})

        def failing(*_):
            raise error(28, "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(server.service.engine, "submit", failing)
            for path, body in self.requests():
                assert server.ask("POST", path, json=body).status_code == 500
        for path, body in self.requests():
            assert server.ask("POST", path, json=body).status_code in (200, 201)


def test_lanes_that_cannot_be_freed_leave_nobody_waiting(loaded, monkeypatch):
    """After losing its device the server reports it, and answers all requests that generate, read or wait."""

    def failing(*_):
        raise RuntimeError("the device is lost")

    with running(*loaded, lanes=3) as server:
        answers = []
        requests = [CAT | {"max_tokens": 4096, "n": 2}, CAT | {"prompt": TEXT * 5000}]
        threads = [
            threading.Thread(target=lambda asked=asked: answers.append(complete(server, **asked).status_code))
            for asked in requests
        ]
        with server.begin("/v1/completions", CAT | {"max_tokens": 4096}):
            for thread in threads:
                thread.start()
            wait_for(lambda: server.unfinished() == 4)
            monkeypatch.setattr(Decoder, "remove", failing)
        for thread in threads:
            thread.join()
        assert answers == [503, 503]
        assert server.ask("GET", "/health").status_code == 503
        assert complete(server, **CAT).status_code == 503


@pytest.mark.parametrize(("part", "call"), [(Decoder, "step"), (Sampler, "draw")])
def test_a_step_that_fails_ends_those_who_are_written_and_not_those_who_are_read(loaded, monkeypatch, part, call):
    """The failed step ends the texts that take part in it, but not prompts that are being read."""
    with running(*loaded, lanes=2) as server:
        read = []
        reader = threading.Thread(
            target=lambda: read.append(server.ask("POST", "/v1/memories", json={"name": "a", "text": TEXT * 500}))
        )
        reader.start()
        while not server.metric("rmkv_queue_length"):
            pass

        works, calls = getattr(part, call), itertools.count()

        def failing(*arguments):
            if next(calls):  # the first token of a text is drawn alone
                raise RuntimeError("out of memory")
            return works(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(part, call, failing)
            assert complete(server, **CAT).status_code == 500
            assert reader.is_alive()
        assert complete(server, **CAT).status_code == 200
        reader.join()
        assert read[0].status_code == 201
