"""The server bounds the number and the waiting time of connections, and answers malformed HTTP."""

import json
import re
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, repeat

import httpx2
import pytest
from small_server import running, wait_for

from rmkv_cli.serving import connection

HOST = b"Host: 127.0.0.1\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
PAGE = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"


def received(client):
    """Return everything that the server sends until it closes the connection; fail if it does not close."""
    data = b""
    with client:
        while part := client.recv(1 << 16):
            data += part
    return data


def error_in(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["message"]


@pytest.fixture(scope="module")
def hasty(loaded):
    with running(*loaded, max_seconds=0.5) as server:
        yield server


class TestDeadlines:
    @pytest.mark.parametrize("sent", [b"", b"GET /hea", HEALTH[:-2], POST], ids=repr)
    def test_a_head_that_does_not_come_is_not_waited_for(self, hasty, sent):
        client = hasty.connect()
        client.sendall(sent)
        assert received(client) == b""

    def test_nor_is_one_that_comes_byte_by_byte(self, hasty):
        with hasty.connect() as client:
            client.settimeout(0.02)
            with suppress(ConnectionError):  # the server may close it while a byte is under way
                for byte in chain(HEALTH[:-2], repeat(ord("x"))):
                    client.sendall(bytes([byte]))
                    with suppress(TimeoutError):
                        assert client.recv(1) == b""
                        break

    def test_nor_is_one_after_an_answer(self, hasty):
        client = hasty.connect()
        client.sendall(HEALTH + HEALTH[:20])
        assert received(client).count(b"HTTP/1.1 200") == 1

    @pytest.mark.parametrize(
        "sent",
        [b"Content-Length: 99\r\n\r\n", b"Content-Length: 99\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{"],
    )
    def test_a_body_that_does_not_come_is_refused(self, hasty, sent):
        client = hasty.connect()
        client.sendall(POST + sent)
        assert error_in(received(client)) == (408, "the body took longer than 0.5 s to arrive")

    def test_an_answer_that_the_client_does_not_read_is_dropped(self, loaded, monkeypatch):
        for name in ("BODY_SECONDS", "ANSWER_SECONDS"):
            monkeypatch.setattr(connection, name, 0.2)
        with running(*loaded, max_seconds=0.5) as server, server.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            client.sendall(PAGE * 1000)  # more than the system keeps on the way
            wait_for(lambda: not server.server.server_state.connections)


@contextmanager
def served(folder, files):
    """Start a server that may open `files` files; yield its port and process, and terminate it at the end."""
    command = [sys.executable, "-m", "rmkv_cli", "serve", "--model", str(folder), "--port", "0", "--device", "cpu"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit) as process:
        try:
            yield int(re.search(r":(\d+);", process.stderr.readline())[1]), process
        finally:
            process.terminate()
            process.wait()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=60)


@pytest.mark.slow
class TestNumber:
    def test_silent_connections_keep_nobody_out(self, folder):
        with served(folder, files=200) as (port, process), ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(connect(port))
            for _ in range(3):
                body = {"prompt": "the cat", "max_tokens": 5}
                answer = httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60, trust_env=False)
                assert answer.status_code == 200
            process.terminate()
            assert process.wait() == 0
            assert process.stderr.read() == "ended\n"

    def test_without_silent_connections_one_more_is_refused(self, folder):
        with served(folder, files=128) as (port, process), ExitStack() as stack:
            for _ in range(16):
                client = stack.enter_context(connect(port))
                client.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 99\r\n\r\n")
                assert b"100" in client.recv(99)
            status, message = error_in(received(connect(port)))
            assert (status, message) == (503, "all 16 connections are in use; try again later")
            process.terminate()
            assert process.wait() == 0  # without waiting for the bodies
            assert process.stderr.read() == "ended\n"


class TestNoHttp:
    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"hello\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\n\r\n", 400),
            (b"GET /h\xe9alth HTTP/1.1\r\n" + HOST + b"\r\n", 400),
            (b"GET /health HTTP/1.1\r\n" + HOST + b"A\x00: b\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\n" + HOST + b"A: b\x00\r\n\r\n", 400),
            (POST + b"Content-Length: -1\r\n\r\n", 400),
            (POST + b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n", 400),
            (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
            (b"GET /health HTTP/1.1\r\n" + HOST + b"A: " + b"b" * (1 << 17), 431),
        ],
    )
    def test_the_error_has_the_form_of_all_errors(self, server, capsys, sent, status):
        client = server.connect()
        client.sendall(sent)
        actual, message = error_in(received(client))
        assert actual == status
        assert "HTTP" in message or "headers" in message
        assert capsys.readouterr().err == ""  # a log that clients could fill

    def test_what_comes_after_an_answer_ends_the_connection(self, server, capsys):
        client = server.connect()
        client.sendall(b"POST /nowhere HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += client.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 404")
        client.sendall(b"no chunk\r\n")
        assert received(client) == b""
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("kind", [b"websocket", b"h2c"])
    def test_an_upgrade_is_not_made(self, server, capsys, kind):
        client = server.connect()
        upgrade = b"Connection: Upgrade, close\r\nUpgrade: " + kind + b"\r\nSec-WebSocket-Key: a\r\n\r\n"
        client.sendall(b"GET /v1/nowhere HTTP/1.1\r\n" + HOST + upgrade)
        assert received(client).startswith(b"HTTP/1.1 404")
        assert capsys.readouterr().err == ""
