"""`rmkv serve` as a process: its start and its end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext

import openai
import pytest
from forked import Forker
from small_run import error_of, save_small_model
from small_server import wait_for

from rmkv_cli.errors import pip_install
from rmkv_cli.model import RMKV
from rmkv_cli.serving import Limits, Server, Service, bind, serve
from rmkv_cli.tokenizer import Tokenizer

CAT = {"model": "small", "prompt": "the cat", "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    save_small_model(folder)
    return folder


@contextmanager
def served(folder, *options, program=("-m", "rmkv_cli")):
    """The process, and a client of it."""
    command = [sys.executable, *program, "serve", "--model", folder, "--port", "0", *options]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        url = re.fullmatch(r"serving small at (http://127\.0\.0\.1:\d+); Ctrl-C stops it\n", line)[1]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=9) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def refuses(url):
    """Return whether the port refuses connections."""
    try:
        socket.create_connection((url.host, url.port)).close()
    except ConnectionError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_answers_end(folder, number, code):
    with served(folder) as (process, client):
        alone = client.completions.create(**CAT, max_tokens=200).choices[0].text
        stream = client.completions.create(**CAT, max_tokens=200, stream=True)
        text = next(stream).choices[0].text
        process.send_signal(number)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert text + "".join(chunk.choices[0].text for chunk in rest) == alone
        assert process.wait() == code
        assert process.stderr.read() == "ended\n"


@pytest.mark.slow
def test_a_second_sigterm_cuts_answers_off_with_an_error(folder):
    endless = "from rmkv_cli.serving import server; server.GRACE = 1e6; from rmkv_cli.__main__ import main; main()"
    with served(folder, "--max-tokens", 10**6, program=("-c", endless)) as (process, client):
        stream = client.completions.create(**CAT, max_tokens=10**6, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: refuses(client.base_url))  # two signals that come at once are one
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is shutting down") as cut:
            list(stream)
        assert cut.value.code == "shutting_down"
        assert process.wait() == 0


@pytest.fixture(scope="module")
def forker():
    """Starts processes that have imported what a server needs."""
    with Forker("rmkv_cli.cli.main", "rmkv_cli.serving") as forker:
        yield forker


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("delay", [0, 0.02, 0.1, 0.3])
def test_a_signal_during_the_start_ends_the_server_like_a_later_one(forker, folder, tmp_path, number, code, delay):
    said = tmp_path / "said"
    process = forker.start("rmkv_cli.__main__:main", "serve", "--model", folder, "--port", "0", err=said)
    wait_for(lambda: process.poll() is not None or (said.exists() and said.read_text().endswith("\n")))
    time.sleep(delay)
    process.send_signal(number)
    assert process.wait() == code
    assert re.fullmatch(r"serving small at http://.*; Ctrl-C stops it\nended\n", said.read_text())


@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, nullcontext()), (signal.SIGINT, pytest.raises(KeyboardInterrupt))]
)
def test_a_signal_before_uvicorn_expects_one_is_not_lost(folder, monkeypatch, number, ending):
    run = Server.run

    def signalled(self, **how):
        signal.raise_signal(number)
        return run(self, **how)

    monkeypatch.setattr(Server, "run", signalled)
    before = signal.getsignal(number)
    service = Service(RMKV.from_pretrained(folder).eval(), Tokenizer.load(folder), "small", Limits())
    with bind("127.0.0.1", 0) as bound, ending:
        serve(service, bound, None, "127.0.0.1")
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_an_unfinished_request_body_does_not_delay_the_end(folder):
    with served(folder) as (process, client):
        client.models.list()
        with socket.create_connection((client.base_url.host, client.base_url.port)) as half:
            half.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"
            )
            assert b"100" in half.recv(99)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
            assert process.stderr.read() == "ended\n"


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "why"),
        [
            (b"", "is empty"),
            (b" \n", "is empty"),
            (b"s\xe9same", "is not printable UTF-8"),
            (b"\xff\xfe", "is not printable UTF-8"),
            (b"a\x07b", "is not printable UTF-8"),
            (b"a\nb", "is not printable UTF-8"),
        ],
    )
    def test_a_key_that_no_client_can_send(self, monkeypatch, capsys, folder, key, why):
        monkeypatch.setenv("RMKV_API_KEY", os.fsdecode(key))
        line = error_of(monkeypatch, capsys, "serve", "--model", folder)
        assert line.startswith(f"error: RMKV_API_KEY {why}")

    def test_other_hosts_need_a_key(self, monkeypatch, capsys, folder):
        monkeypatch.delenv("RMKV_API_KEY", raising=False)
        line = error_of(monkeypatch, capsys, "serve", "--model", folder, "--host", "0.0.0.0")
        assert "RMKV_API_KEY" in line
        assert "--allow-anyone" in line

    def test_a_port_that_is_in_use(self, monkeypatch, capsys, folder):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            line = error_of(monkeypatch, capsys, "serve", "--model", folder, "--port", port)
        assert line == f"error: port {port} is already in use; choose another with --port"

    def test_an_invalid_limit(self, monkeypatch, capsys, folder):
        line = error_of(monkeypatch, capsys, "serve", "--model", folder, "--lanes", 0, "--port", 0)
        assert line.startswith("error: serve: lanes: ")

    @pytest.mark.parametrize("name", ["fastapi", "prometheus_client", "uvicorn"])
    def test_a_missing_package(self, monkeypatch, capsys, folder, name):
        for module in [module for module in sys.modules if module.startswith("rmkv_cli.serving")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        line = error_of(monkeypatch, capsys, "serve", "--model", folder)
        assert line == f"error: {name} is not installed; {pip_install('serve')}"


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ("stories", "--memory stories: should be NAME=FILE"),
        ("stories=", "--memory stories=: should be NAME=FILE"),
        ("a story=x", "--memory a story=x: name: string should match pattern"),
        ("stories=nowhere.rmkv", "nowhere.rmkv: no such file"),
    ],
)
def test_a_memory_that_cannot_be_loaded_is_reported(folder, memory, says, monkeypatch, capsys):
    assert says in error_of(monkeypatch, capsys, "serve", "--model", folder, "--port", "0", "--memory", memory)
