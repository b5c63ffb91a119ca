"""What a server refuses, which clients it accepts, what it counts, and that a leaving client frees everything."""

import json
import threading

import openai
import pytest
from small_server import all_texts_freed, running, wait_for

CAT = {"model": "small", "prompt": "the cat", "max_tokens": 12, "seed": 3}
LONG = CAT | {"max_tokens": 4096}
TEXT = "the dog sat on the log. "


@pytest.fixture
def narrow(loaded):
    with running(*loaded, lanes=1, queue=1) as server:
        yield server


class TestQueue:
    def test_a_client_of_a_full_server_gets_a_retry_time(self, narrow):
        with narrow.client() as client, narrow.client(max_retries=20) as patient:
            writing = client.completions.create(**LONG, stream=True)
            next(writing)
            waiting = threading.Thread(target=lambda: patient.completions.create(**CAT))
            waiting.start()
            wait_for(lambda: narrow.metric("rmkv_queue_length") == 1)
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(**CAT)
            assert refused.value.code == "queue_full"
            assert refused.value.response.headers["Retry-After"] == "1"
            writing.close()
            waiting.join()
            assert client.completions.create(**CAT).usage.completion_tokens == 12

    def test_what_is_read_is_in_it_too(self, narrow):
        with narrow.client() as client:
            writing = [client.completions.create(**LONG, stream=True)]
            next(writing[0])
            waiting = threading.Thread(
                target=narrow.ask, args=("POST", "/v1/memories"), kwargs={"json": {"name": "a", "text": TEXT * 100_000}}
            )
            waiting.start()
            wait_for(lambda: narrow.metric("rmkv_queue_length") == 1)
            refused = narrow.ask("POST", "/v1/memories", json={"name": "b", "text": TEXT})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            writing[0].close()
            narrow.service.engine.shut(0)
            waiting.join()

    def test_a_long_prompt_does_not_stop_others_from_generating(self, loaded):
        with running(*loaded, lanes=2) as server, server.client() as client:
            read = threading.Thread(
                target=server.ask, args=("POST", "/v1/memories"), kwargs={"json": {"name": "a", "text": TEXT * 2000}}
            )
            read.start()
            wait_for(lambda: server.metric("rmkv_queue_length") == 1)
            assert client.completions.create(**CAT).usage.completion_tokens == 12
            assert server.metric("rmkv_queue_length") == 1
            assert read.is_alive()
            server.service.engine.shut(0)
            read.join()

    @pytest.mark.parametrize("prompt", [TEXT * 5000, "x" * 200_000], ids=["words", "one word"])
    def test_a_short_request_does_not_wait_for_a_long_prompt(self, loaded, prompt):
        """The large request asks for all lanes, and part of its text has no token boundary at which to cut."""
        with running(*loaded, lanes=4) as server, server.client() as client:
            large = threading.Thread(
                target=server.ask, args=("POST", "/v1/completions"), kwargs={"json": {"prompt": [prompt] * 4}}
            )
            large.start()
            wait_for(lambda: server.metric("rmkv_queue_length") == 4)
            for _ in range(3):
                assert client.completions.create(**CAT).usage.completion_tokens == 12
            assert server.metric("rmkv_queue_length") == 4
            assert large.is_alive()
            server.service.engine.shut(0)
            large.join()


class TestTime:
    def test_the_time_of_a_request_is_bounded(self, loaded):
        with running(*loaded, max_seconds=0.5) as server, server.client() as client:
            with pytest.raises(openai.InternalServerError) as late:
                client.completions.create(**LONG)
            assert (late.value.status_code, late.value.code) == (504, "timeout")
            with pytest.raises(openai.APIError, match=r"took longer than this server's limit of 0.5 s") as cut:
                list(client.completions.create(**LONG, stream=True))
            assert cut.value.code == "timeout"
            assert server.metric("rmkv_lanes_busy") == 0


class TestBody:
    def test_the_bytes_of_a_body_are_bounded(self, loaded):
        with running(*loaded, max_body=1000) as server:
            fits = json.dumps(CAT).encode().ljust(1000)
            how = {"headers": {"Content-Type": "application/json"}}
            assert server.ask("POST", "/v1/completions", content=fits, **how).status_code == 200
            for body in (fits + b" ", iter([fits, b" "])):  # with and without a Content-Length
                refused = server.ask("POST", "/v1/completions", content=body, **how)
                assert refused.status_code == 413
                assert refused.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def locked(loaded):
    with running(*loaded, key="sésame") as server:
        yield server


class TestKey:
    @pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer no", "Basic sésame", "sésame"])
    def test_a_client_without_the_key_is_refused(self, locked, given):
        headers = {} if given is None else {"Authorization": given.encode()}
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/no")):
            refused = locked.ask(method, path, headers=headers, content=b"not read")
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")

    def test_a_client_with_the_key_is_accepted(self, locked):
        headers = {"Authorization": "Bearer sésame".encode()}
        assert locked.ask("POST", "/v1/completions", json=CAT, headers=headers).status_code == 200
        elsewhere = headers | {"Host": "example.org"}
        assert locked.ask("GET", "/v1/models", headers=elsewhere).status_code == 200

    @pytest.mark.parametrize(
        "given", [b"Bearer \xe9", b"Bearer s\xe9same", b"\xff\xfe Bearer", b"Bearer \xa0", b"B\xe9arer x"]
    )
    def test_bytes_that_are_not_ascii_are_not_a_key(self, locked, given):
        refused = locked.ask("GET", "/v1/models", headers={"Authorization": given})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")

    def test_the_key_s_last_byte_counts_whatever_it_is(self, loaded):
        """Headers are decoded as latin-1, in which the second byte of an à is a space."""
        with running(*loaded, key="voilà") as server:
            assert (
                server.ask("GET", "/v1/models", headers={"Authorization": "Bearer voilà".encode()}).status_code == 200
            )
            assert server.ask("GET", "/v1/models", headers={"Authorization": b"Bearer voil\xc3"}).status_code == 401

    def test_health_and_the_page_are_open(self, locked):
        assert locked.ask("GET", "/health").json() == {"status": "ok"}
        assert locked.ask("GET", "/").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("Localhost:80", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200), ("evil.example", 403), ("127.0.0.1.evil", 403)],
)
def test_without_a_key_it_answers_to_its_own_names_alone(server, host, status):
    """Else a page of another site, whose name leads here, could use it."""
    assert server.ask("GET", "/v1/models", headers={"Host": host}).status_code == status


def test_it_answers_to_the_host_that_it_is_bound_to(loaded):
    with running(*loaded, host="127.0.0.2") as server:
        assert server.ask("GET", "/v1/models").status_code == 200
        assert server.ask("GET", "/v1/models", headers={"Host": "127.0.0.3"}).status_code == 403


def test_the_page_may_use_nothing_from_elsewhere(server):
    page = server.ask("GET", "/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["Content-Security-Policy"].split(";"))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    assert all(policy[kind].startswith("'sha256-") for kind in ("script-src", "style-src"))
    text = page.text
    for harmless in ("http://www.w3.org/2000/svg", r"https?:\/\/", '["http:", "https:"]'):  # the last two check links
        text = text.replace(harmless, "")
    assert "http" not in text


class TestLeaving:
    def test_a_client_that_leaves_a_stream_frees_its_lane(self, loaded):
        with running(*loaded) as server, server.client() as client:
            for _ in range(3):
                stream = client.completions.create(**LONG, stream=True)
                next(stream)
                wait_for(lambda: server.metric("rmkv_lanes_busy") == 1)
                stream.close()
                wait_for(lambda: server.metric("rmkv_lanes_busy") == 0)
            assert server.metric("rmkv_tokens_written_total") < 4096

    def test_a_client_that_leaves_before_its_answer_frees_its_lane(self, loaded):
        with running(*loaded) as server:
            with server.begin("/v1/completions", LONG):
                wait_for(lambda: server.metric("rmkv_lanes_busy") == 1)
            wait_for(lambda: server.unfinished() == 0)
            assert server.metric("rmkv_tokens_written_total") < 4096
            left = 'rmkv_requests_total{route="/v1/completions",status="499"} 1.0'
            wait_for(lambda: left in server.ask("GET", "/metrics").text)

    def test_a_client_that_leaves_the_queue_frees_its_place(self, narrow):
        with narrow.client() as client:
            stream = client.completions.create(**LONG, stream=True)
            next(stream)
            with narrow.begin("/v1/completions", LONG):
                wait_for(lambda: narrow.metric("rmkv_queue_length") == 1)
            wait_for(lambda: narrow.metric("rmkv_queue_length") == 0)
            stream.close()


def test_metrics_count_what_was_done(loaded):
    with running(*loaded, lanes=3) as server, server.client() as client:
        first = client.completions.create(**CAT, n=2)
        client.completions.create(**CAT, stop=first.choices[0].text[3:5])
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**CAT, n=4)
        server.ask("POST", "/v1/memories", json={"name": "a", "text": TEXT})
        read = 2 * len(loaded[1].encode_document(["the cat"])) + len(loaded[1].encode_document([TEXT]))
        assert server.metric("rmkv_tokens_read_total") == read
        assert 24 < server.metric("rmkv_tokens_written_total") < 36
        assert (server.metric("rmkv_lanes"), server.metric("rmkv_memories")) == (3, 1)
        assert server.metric("rmkv_first_token_seconds_count") == 2
        text = server.ask("GET", "/metrics").text
        for line in (
            'rmkv_requests_total{route="/v1/completions",status="200"} 2.0',
            'rmkv_requests_total{route="/v1/completions",status="400"} 1.0',
            'rmkv_requests_total{route="/v1/memories",status="201"} 1.0',
            'rmkv_request_seconds_count{route="/v1/completions"} 3.0',
        ):
            assert line in text


def test_generated_texts_are_freed_at_once(loaded):
    """Not when the garbage collector comes by, which counts objects and not the bytes of their states."""
    with running(*loaded, max_seconds=1) as server:
        server.ask("POST", "/v1/completions", json=CAT)
        with all_texts_freed():
            for asked in (CAT, CAT | {"n": 2}, LONG):
                server.ask("POST", "/v1/completions", json=asked)
