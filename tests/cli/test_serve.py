"""`rmkv serve` as a process: how it begins, and how it ends."""

import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import openai
import pytest
from small_run import error_of, save_small_model

CAT = {"model": "small", "prompt": "the cat", "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    save_small_model(folder)
    return folder


@contextmanager
def served(folder, *options):
    """The process, and a client of it."""
    command = [sys.executable, "-m", "rmkv_cli", "serve", "--model", folder, "--port", "0", *options]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        url = re.fullmatch(r"serving small at (http://127\.0\.0\.1:\d+); Ctrl-C ends it\n", line)[1]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=9) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


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
        assert process.wait(20) == code
        assert process.stderr.read() == "ended\n"


@pytest.mark.slow
def test_a_second_sigterm_cuts_them_off_with_an_error(folder):
    with served(folder, "--max-tokens", 10**6) as (process, client):
        stream = client.completions.create(**CAT, max_tokens=10**6, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # two that come at once are one
        process.send_signal(signal.SIGTERM)
        second = time.monotonic()
        with pytest.raises(openai.APIError, match="the server is shutting down") as cut:
            list(stream)
        assert cut.value.code == "shutting_down"
        assert process.wait(20) == 0
        assert time.monotonic() - second < 5  # after the first alone, answers have 10 s to end


class TestRefusals:
    def test_others_are_let_in_only_with_a_key(self, monkeypatch, capsys, folder):
        monkeypatch.delenv("RMKV_API_KEY", raising=False)
        line = error_of(monkeypatch, capsys, "serve", "--model", folder, "--host", "0.0.0.0")
        assert "RMKV_API_KEY" in line
        assert "--allow-anyone" in line

    def test_a_port_that_is_taken(self, monkeypatch, capsys, folder):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            line = error_of(monkeypatch, capsys, "serve", "--model", folder, "--port", port)
        assert line == f"error: 127.0.0.1:{port}: cannot be listened at: address already in use"

    def test_a_limit_that_is_none(self, monkeypatch, capsys, folder):
        line = error_of(monkeypatch, capsys, "serve", "--model", folder, "--lanes", 0, "--port", 0)
        assert line.startswith("error: serve: lanes: ")

    @pytest.mark.parametrize("name", ["fastapi", "prometheus_client", "uvicorn"])
    def test_a_package_that_is_missing(self, monkeypatch, capsys, folder, name):
        for module in [module for module in sys.modules if module.startswith("rmkv_cli.serving")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        line = error_of(monkeypatch, capsys, "serve", "--model", folder)
        assert line == f"error: {name} is not installed; pip install 'rmkv[serve]'"
