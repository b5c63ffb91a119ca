"""Many clients at once each get their own answer, and no request body breaks the server."""

import json
import random
import resource
import string
import threading
import time
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_server import running

from rmkv_cli.serving.protocol import NEUTRAL, ChatRequest, CompletionRequest, MemoryRequest

WORDS = ("the cat", "a dog", "the log and the mat", "", "mat " * 30)


def resident():
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def request_of(number):
    """One of many different requests; a third are streams that their clients leave."""
    draw = random.Random(number)
    return {
        "prompt": draw.choice(WORDS),
        "max_tokens": draw.randint(1, 24),
        "seed": draw.randrange(1000),
        "temperature": draw.choice([0, 0.8, 2.0]),
        "top_k": draw.choice([0, 5]),
        "n": draw.choice([1, 1, 2]),
        "stop": draw.choice([[], ["a"]]),
        "logprobs": draw.choice([None, 1]),
    }


@pytest.mark.slow
def test_64_clients_get_each_its_own_answer(loaded):
    requests = [request_of(number) for number in range(40)]
    with running(*loaded, lanes=16, queue=200) as server:

        def ask(client, number):
            answer = client.post(f"{server.url}/v1/completions", json=requests[number])
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"]

        with httpx2.Client(timeout=60, trust_env=False) as client:
            alone = [ask(client, number) for number in range(len(requests))]
        wrong, answered = [], [0] * 64

        def work(worker):
            draw = random.Random(worker)
            with httpx2.Client(timeout=60, trust_env=False) as client:
                while time.monotonic() < until or not answered[worker]:
                    number = draw.randrange(len(requests))
                    if draw.random() < 0.2:
                        streamed = requests[number] | {"stream": True}
                        with client.stream("POST", f"{server.url}/v1/completions", json=streamed) as answer:
                            next(answer.iter_lines())
                        continue
                    if (got := ask(client, number)) != alone[number]:
                        wrong.append((number, got))
                    answered[worker] += 1

        for seconds in (2, 6):  # the first round warms up
            until = time.monotonic() + seconds
            before = resident()
            workers = [threading.Thread(target=work, args=(i,)) for i in range(64)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert wrong == []
        assert min(answered) > 0
        while server.unfinished():
            time.sleep(0.05)
        assert resident() - before < 16 << 20


FIELDS = sorted(
    {"zz", *NEUTRAL}.union(*(kind.model_fields for kind in (CompletionRequest, ChatRequest, MemoryRequest)))
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 2**64, 1e308])
TEXTS = st.text(max_size=20) | st.text(st.characters(), max_size=5) | st.sampled_from(["a", "\ud800", "the cat", "\0"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES | TEXTS}
    ),
    max_size=3,
)
LIKELY = st.fixed_dictionaries(
    {"prompt": TEXTS, "messages": MESSAGES, "text": TEXTS, "name": TEXTS, "max_tokens": st.integers(1, 4)}
)
OF_EACH = {"/v1/completions": ("prompt",), "/v1/chat/completions": ("messages",), "/v1/memories": ("name", "text")}
HEADERS = st.dictionaries(
    st.sampled_from(["Content-Type", "Accept", "Authorization", "X-Any", "Expect", "Accept-Encoding", "Origin"]),
    st.text(string.printable.strip(), max_size=20) | st.sampled_from(["application/json", "text/plain", "a/b; c=d"]),
    max_size=3,
)


@pytest.fixture(scope="module")
def open_to_all(loaded):
    with running(*loaded, max_memories=10**6, max_memory_bytes=10**12) as server:
        yield server


def check(answer):
    assert 200 <= answer.status_code < 300 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


FUZZ = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.slow
@FUZZ
@given(
    path=st.sampled_from(sorted(OF_EACH)),
    likely=LIKELY,
    more=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
def test_no_request_breaks_it(open_to_all, path, likely, more):
    body = {key: likely[key] for key in OF_EACH[path]} | ({} if path == "/v1/memories" else {"max_tokens": 2}) | more
    headers = {"Content-Type": "application/json"}
    check(open_to_all.ask("POST", path, content=json.dumps(body).encode(), headers=headers))


@FUZZ
@given(
    path=st.sampled_from(
        [*sorted(OF_EACH), "/v1/memories/a", "/v1/models/x", "/health", "/metrics", "/", "/%00", "/é"]
    ),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]),
    body=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()),
    headers=HEADERS,
)
def test_no_method_body_or_header_does(open_to_all, path, method, body, headers):
    try:
        answer = open_to_all.ask(method, path, content=body, headers={k: v.encode() for k, v in headers.items()})
    except httpx2.LocalProtocolError:  # the client itself does not send such a header
        return
    if method == "HEAD":
        assert answer.status_code < 500
    else:
        check(answer)
