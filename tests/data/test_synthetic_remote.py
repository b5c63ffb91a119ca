"""A remote writer: every request is answered and paid once, whatever happens to the server and the process."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from forked import Forker
from small_writer import FAULTS, a_recipe, small_writer

from rmkv_cli.config import Writer
from rmkv_cli.data.synthetic import generate_data, remote, remote_writer
from rmkv_cli.errors import UserError
from rmkv_cli.progress import plural

GENERATE = "data", "generate", "r.toml", "--out", "out.jsonl"
RECIPE = """
count = {count}
prompt = "Write about {{topic}}."
[writer]
model = "m"
url = "{url}"
parallel = 6
[slots.topic]
values = ["cats", "dogs", "trees"]
"""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 10)


def made(folder, paid, name="out", environment=(), **writer):
    recipe = a_recipe(writer={"model": "m", "url": paid.url} | writer, system="Be brief.")
    write, identity = remote_writer(recipe.writer, dict(environment))
    return generate_data(recipe, folder, folder / f"{name}.jsonl", write, identity)


def test_requests_are_in_openai_s_protocol_with_the_key_from_the_environment(tmp_path):
    with small_writer() as paid:
        report = made(tmp_path, paid, environment={"MY_KEY": "secret"}, key_env="MY_KEY")
        path, body = paid.bodies[0]
        assert path == "/v1/chat/completions"
        assert body["model"] == "m"
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert {"temperature", "top_p", "max_tokens", "seed"} < body.keys()
        assert paid.headers[0]["Authorization"] == "Bearer secret"
        assert (report.prompt_tokens, report.tokens) == (40 * 3, 40 * 5)
        made(tmp_path, paid, "text", asks_by="text")
        path, body = paid.bodies[-1]
        assert path == "/v1/completions"
        assert body["prompt"].startswith("Write about")
        assert "Authorization" not in paid.headers[-1]


@pytest.mark.parametrize("fault", [*FAULTS, "500", "502", "408", "409"])
def test_a_temporary_failure_is_retried_and_paid_once(tmp_path, impatient, fault):
    with small_writer(faults=(fault,), share=0.5) as paid, small_writer() as sound:
        report = made(tmp_path, paid)
        assert (report.rows, report.rejected) == (40, {})
        assert len(paid.received) > 50
        assert set(paid.billed.values()) == {1}
        made(tmp_path, sound, "sound")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "sound.jsonl").read_bytes()


@pytest.mark.parametrize("parallel", [1, 7])
def test_no_more_than_the_allowed_requests_are_in_flight(tmp_path, parallel):
    with small_writer() as paid:
        paid.hold.clear()
        with process(tmp_path, paid, parallel=parallel) as command:
            wait_for(lambda: len(paid.received) == parallel)
            time.sleep(0.2)
            assert len(paid.received) == parallel
            paid.hold.set()
            assert command.wait() == 0


@pytest.mark.parametrize(
    ("fault", "keys", "words"),
    [
        ("401 bad key", {"key_env": "K"}, "the server refuses the key in K: 401 Unauthorized: bad key"),
        ("401 bad key", {}, "the server refuses a request without writer.key_env"),
        ("404 no m", {}, "no such address, or no model 'm' there: 404 Not Found: no m"),
        ("429 insufficient_quota", {}, "the account's quota is exhausted"),
        ("400 bad temperature", {}, "the writer refused the first 10 requests: 400 Bad Request: bad temperature"),
        ("503", {}, "answers 503 Service Unavailable: try later; given up after 11 attempts. Run the command again"),
        ("closed", {}, "given up after 11 attempts"),
    ],
)
def test_a_permanent_failure_ends_generation_in_one_line(tmp_path, impatient, fault, keys, words):
    with small_writer(faults=(fault,), share=1) as paid, pytest.raises(UserError) as caught:
        made(tmp_path, paid, environment={"K": "k"}, parallel=2, **keys)
    assert words in str(caught.value)
    assert not paid.billed


def test_a_missing_api_key_is_named():
    with pytest.raises(UserError, match="MY_KEY is not set; export it"):
        remote_writer(Writer(model="m", url="http://x/v1", key_env="MY_KEY"), {})


def test_retry_after_is_a_number_or_a_date():
    assert remote.retry_after("2.5") == 2.5
    assert remote.retry_after("-1") == 0
    assert remote.retry_after("1e9") == remote.LONGEST_WAIT
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < remote.retry_after(later) <= 100
    for nothing in (None, "", "soon"):
        assert remote.retry_after(nothing) is None


@contextmanager
def process(folder, paid, parallel=6):
    """Run the command; kill it at the end of the block if it still runs."""
    text = RECIPE.format(count=40, url=paid.url).replace("parallel = 6", f"parallel = {parallel}")
    (folder / "r.toml").write_text(text)
    command = [sys.executable, "-m", "rmkv_cli", *GENERATE]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, text=True, **output) as command:
        try:
            yield command
        finally:
            command.kill()


def wait_for(condition):
    while not condition():  # pytest's time limit ends it
        time.sleep(0.002)


def journalled(folder):
    """The keys of the journal's whole lines."""
    path = folder / "out.jsonl.journal"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return {json.loads(line)["key"] for line in lines if line.endswith(b"\n")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "parallel"),
    [
        (signal.SIGINT, 130, 6),
        (signal.SIGINT, 130, 1),
        pytest.param(signal.SIGTERM, 143, 6, marks=pytest.mark.slow),
    ],
)
def test_a_signal_waits_for_the_answers_in_flight_and_sends_nothing_more(tmp_path, number, code, parallel):
    with small_writer() as paid:
        paid.hold.clear()
        answers = plural(parallel, "answer")
        with process(tmp_path, paid, parallel=parallel) as command:
            wait_for(lambda: len(paid.received) == parallel)
            command.send_signal(number)
            waiting = next(line for line in command.stderr if "Waiting" in line)
            assert f"Waiting for {answers}; Ctrl-C again abandons them." in waiting
            time.sleep(0.3)  # a command that does not wait ends here
            paid.hold.set()
            assert command.wait() == code
            assert f"{answers} saved in out.jsonl.journal; the same command continues" in command.stderr.read()
        assert set(paid.received) == journalled(tmp_path)
        assert len(paid.received) == parallel
        with process(tmp_path, paid) as again:
            again.communicate()
        assert again.returncode == 0
        assert len(paid.received) == len(set(paid.received)) == 40


def test_a_second_signal_ends_generation_at_once(tmp_path):
    with small_writer() as paid:
        paid.hold.clear()
        with process(tmp_path, paid) as command:
            wait_for(lambda: len(paid.received) == 6)
            command.send_signal(signal.SIGINT)
            next(line for line in command.stderr if "Waiting" in line)
            command.send_signal(signal.SIGINT)
            assert command.wait() == 130


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_twenty_times_no_request_is_lost_and_none_is_paid_twice(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    with (
        small_writer(share=0.3, seed=seed) as paid,
        small_writer() as sound,
        Forker("httpx2", "rmkv_cli.cli.main", "rmkv_cli.data.synthetic") as forker,
    ):

        def begun(name, server):
            (tmp_path / name).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / name)
            Path("r.toml").write_text(RECIPE.format(count=400, url=server.url))
            return forker.start("rmkv_cli.__main__:main", *GENERATE)

        folder = tmp_path / "killed"
        for _ in range(20):
            answered = journalled(folder)
            before = len(paid.received)
            command = begun("killed", paid)
            wait_for(lambda before=before: len(paid.received) > before)
            target = len(paid.received) + draw.randrange(16)
            wait_for(lambda target=target: len(paid.received) >= target)
            time.sleep(0.01 * draw.random())
            command.kill()
            assert command.wait() == -signal.SIGKILL
            time.sleep(0.05)  # requests that are on their way reach the server
            assert answered <= journalled(folder)
            assert not answered & set(paid.received[before:])  # what is in the journal is never asked for again
        assert not (folder / "out.jsonl").exists()
        assert begun("killed", paid).wait() == 0
        assert len(paid.billed) == 400
        assert set(paid.billed.values()) == {1}
        assert journalled(folder) == set(paid.billed)
        rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert [row["seed"] for row in rows] == list(range(400))
        assert begun("sound", sound).wait() == 0
    assert (tmp_path / "sound" / "out.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()
