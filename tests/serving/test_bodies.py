"""A request body beyond the bounds is rejected with field and bound, before it slows down other clients."""

import json
import threading

import pytest
from small_server import running

from rmkv_cli.serving import body
from rmkv_cli.serving.body import MAX_DEPTH, MAX_VALUES, parse
from rmkv_cli.serving.errors import ApiError
from rmkv_cli.serving.protocol import MAX_KEYS, ChatRequest, CompletionRequest

JSON = {"Content-Type": "application/json"}
TURN = {"role": "user", "content": ""}


def refusal(kind, text):
    with pytest.raises(ApiError) as refused:
        parse(kind, text if isinstance(text, bytes) else json.dumps(text).encode())
    assert refused.value.status == 400
    return refused.value.param, refused.value.message


class TestBounds:
    @pytest.mark.parametrize(
        ("kind", "asked", "param", "bound"),
        [
            (ChatRequest, {"messages": [{}] * MAX_VALUES}, "messages", f"{MAX_VALUES:,} keys and values"),
            (CompletionRequest, {"prompt": [[]] * MAX_VALUES}, "prompt", f"{MAX_VALUES:,} keys and values"),
            (CompletionRequest, {"prompt": "a", "metadata": [0] * MAX_VALUES}, "metadata", f"{MAX_VALUES:,} keys"),
            (CompletionRequest, {str(i): "a" for i in range(MAX_VALUES)}, None, f"{MAX_VALUES:,} keys and values"),
            (CompletionRequest, {str(i): 0 for i in range(MAX_KEYS + 1)}, None, f"{MAX_KEYS} keys"),
            (CompletionRequest, b'{"prompt": ' + b"[" * MAX_DEPTH + b"]}", "prompt", f"{MAX_DEPTH} levels"),
            (CompletionRequest, b"[" * (MAX_DEPTH + 1), None, f"{MAX_DEPTH} levels"),
            (ChatRequest, {"messages": [TURN] * 4097}, "messages", "4096 items"),
            (
                ChatRequest,
                {"messages": [TURN | {str(i): 0 for i in range(MAX_KEYS)}]},
                "messages.0",
                f"{MAX_KEYS} keys",
            ),
            (CompletionRequest, {"prompt": ["a"] * 1025}, "prompt", "1024 items"),
            (CompletionRequest, {"prompt": "a", "stop": ["a"] * 5}, "stop", "4 items"),
            (CompletionRequest, {"prompt": "a", "model": "m" * 257}, "model", "256 characters"),
        ],
    )
    def test_the_refusal_names_the_field_and_the_bound(self, kind, asked, param, bound):
        named, message = refusal(kind, asked)
        assert named == param
        assert message.startswith(f"{param or 'the body'}")
        assert f"at most {bound}" in message

    def test_a_body_within_the_bounds_is_accepted(self):
        assert len(parse(ChatRequest, json.dumps({"messages": [TURN] * 4096}).encode()).messages) == 4096
        text = '{"[,]}": "\\" \\\\' * 10_000  # brackets, commas and quotes within a text are text
        assert parse(CompletionRequest, json.dumps({"prompt": text}).encode()).prompt == [text]

    def test_a_long_key_is_not_repeated_in_full(self):
        assert len(refusal(CompletionRequest, {"k" * 10**6: 1, "prompt": "a"})[1]) < 200

    @pytest.mark.parametrize(
        "text",
        [b'"' * 10**6, b'"\\' * 10**6, b"]" * 10**6, b"," * 10**6, b"9" * 10**6, b"\xff" * 100, b'{"prompt": "a'],
    )
    def test_a_body_that_is_not_json_is_refused(self, text):
        assert refusal(CompletionRequest, text)[1].startswith("the body")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
    def test_json_is_utf_8(self, encoding):
        """In another encoding the bounds would be checked on other characters."""
        assert "not valid JSON" in refusal(CompletionRequest, json.dumps({"prompt": "a"}).encode(encoding))[1]


def test_others_are_answered_while_a_large_body_is_parsed(server, monkeypatch):
    """Such 16 MB once blocked the event loop for a minute and a half, and took 5 GB."""
    health_answered = threading.Event()

    def parse_late(*what):
        assert health_answered.wait(60)
        return parse(*what)

    monkeypatch.setattr(body, "parse", parse_late)
    hostile = b'{"messages": [' + b'{"role":1},' * 1_450_000 + b"{}]}"
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(server.ask("POST", "/v1/chat/completions", content=hostile, headers=JSON))
    )
    asking.start()
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    assert answers == []
    health_answered.set()
    asking.join()
    assert answers[0].status_code == 400
    error = answers[0].json()["error"]
    assert error["message"] == f"messages: should have at most {MAX_VALUES:,} keys and values"
    assert error["param"] == "messages"


def test_only_json_is_read(server):
    """A page of another site can send other content types without the server's permission."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data; a=json"):
        refused = server.ask("POST", "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert refused.status_code == 400
        assert "Content-Type: application/json" in refused.json()["error"]["message"]
    for kind in ("Application/JSON; charset=utf-8", "application/vnd.api+json"):
        body = b'{"prompt": "a", "max_tokens": 1}'
        assert server.ask("POST", "/v1/completions", content=body, headers={"Content-Type": kind}).status_code == 200


def test_the_bytes_of_all_bodies_are_bounded(loaded):
    """The bound is four times the largest body."""
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode().ljust(1000)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with running(*loaded, max_body=1000) as server:
        clients = [server.connect() for _ in range(5)]
        for client in clients:
            client.sendall(head + b"Content-Length: 1000\r\n\r\n" + body[:900])
        answered = None
        while answered is None:  # the one that came last is not waited for
            answered = next((x for x in clients if _has_answer(x)), None)
        assert b" 429 " in answered.recv(1 << 16).splitlines()[0]
        for client in clients:
            if client is not answered:
                client.sendall(body[900:])
                assert b" 200 " in client.recv(1 << 16).splitlines()[0]
            client.close()
        assert server.ask("POST", "/v1/completions", content=body, headers=JSON).status_code == 200


def _has_answer(client):
    client.settimeout(0.05)
    try:
        return bool(client.recv(1, 2))  # MSG_PEEK
    except TimeoutError:
        return False
    finally:
        client.settimeout(60)
