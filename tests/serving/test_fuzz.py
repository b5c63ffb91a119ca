"""Requests with damaged bytes: each gets a valid answer or an error that says what is wrong, and none hangs."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_server import running

CASES, SEED = 500, 7
END = b"\r\nHost: 127.0.0.1\r\nConnection: close\r\nAuthorization: Bearer key\r\n"
ODD = (
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\r\n",
    b"\r\n\r\n",
    b":",
    b" ",
    b"%00",
    b"%ff",
    b"..",
    b"\\ud800",
    b"1" * 5000,
    b"[" * 20,
)


def request(line, body=None, more=b""):
    if body is None:
        return line + b" HTTP/1.1" + END + more + b"\r\n"
    content = json.dumps(body).encode()
    more += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(content)
    return request(line, more=more) + content


CAT = {"prompt": "the cat", "max_tokens": 1, "seed": 3, "stop": ["a"], "logprobs": 1}
WHOLE = (
    request(b"GET /health"),
    request(b"GET /v1/models/small?a=b&c=%20", more=b"Accept: */*\r\nCookie: a=b; c=d\r\n"),
    request(b"GET /metrics"),
    request(b"GET /v1/memories/dogs"),
    request(b"DELETE /v1/memories/dogs"),
    request(b"POST /v1/memories", {"name": "dogs", "text": "the dog"}),
    request(b"POST /v1/memories/dogs", {"text": "the dog"}),
    request(b"POST /v1/completions", CAT),
    request(b"POST /v1/completions", CAT | {"stream": True, "stream_options": {"include_usage": True}}),
    request(b"POST /v1/completions", CAT | {"memory": "dogs", "keep": True}, b"Expect: 100-continue\r\n"),
    request(b"POST /v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
    request(b"POST /v1/completions", more=b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n")
    + b'f\r\n{"prompt": "a",\r\n11\r\n "max_tokens": 1}\r\n0\r\n\r\n',
)


def damaged(draw):
    """Return one of the requests after one to three random changes."""
    data = bytearray(draw.choice(WHOLE))
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice([1, 1, 4, 30]))
        mishap = draw.choice(["flip", "insert", "odd", "cut", "repeat", "end"])
        if mishap == "flip" and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif mishap == "insert":
            data[start:start] = draw.randbytes(draw.choice([1, 3]))
        elif mishap == "odd":
            data[start:start] = draw.choice(ODD)
        elif mishap == "cut":
            del data[start:end]
        elif mishap == "repeat":
            data[start:start] = data[start:end]
        elif mishap == "end":
            del data[start:]
    return bytes(data)


def answers(server, sent):
    """Return the statuses of all answers until the server closes the connection, and the last body."""
    with server.connect() as client:
        client.sendall(sent)
        data = b""
        while part := client.recv(1 << 16):
            data += part
    statuses = [int(line.split()[1]) for line in data.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return statuses, data.rpartition(b"\r\n\r\n")[2]


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "key"], ids=["open", "locked"])
def test_no_damaged_request_gets_a_500_or_hangs(loaded, capsys, key):
    draw = random.Random(SEED)
    sent = [damaged(draw) for _ in range(CASES)]
    with running(*loaded, key=key, max_seconds=3, max_memories=10**6, max_memory_bytes=10**12) as server:
        with ThreadPoolExecutor(48) as pool:
            found = list(pool.map(lambda data: answers(server, data), sent))
        assert server.ask("GET", "/health").status_code == 200
    for data, (statuses, body) in zip(sent, found, strict=True):
        assert all(status < 500 or status == 501 for status in statuses), (data, statuses)
        if statuses and statuses[-1] >= 400:
            assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}, (data, body)
    assert {200, 400, 404} <= {status for statuses, _ in found for status in statuses}
    assert capsys.readouterr().err == ""
