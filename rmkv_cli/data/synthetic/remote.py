"""A writer that is a server with OpenAI's protocol: parallel requests, repeated while the server fails."""

import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

from rmkv_cli.config import Writer
from rmkv_cli.data.synthetic.requests import REFUSED, Answer, Request, Write
from rmkv_cli.errors import UserError
from rmkv_cli.progress import PLAIN_INTERVAL, plural, stderr

WAITS = (0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60)
"""Seconds before each repetition of a request, unless the server names them; after the last one it is abandoned."""
LONGEST_WAIT = 3600.0
"""Maximum seconds that a server may ask to wait."""
TEMPORARY = {408, 409, 425, 429, *range(500, 600)}
TIMEOUT = httpx2.Timeout(60, connect=10, read=600)
"""Timeouts in seconds; the one for reading is long, because a server sends nothing until an answer is complete."""


class _IncompleteError(Exception):
    """An answer that is not complete."""


def remote_writer(writer: Writer, environment: Mapping[str, str] = os.environ) -> tuple[Write, str]:
    """Return a function that has a server answer requests, and the writer's identity: its address and model.

    Each request sends its key as the header Idempotency-Key. After a signal, no further request is sent and the answers
    in flight are awaited; a second signal abandons them.

    Raises:
        UserError: the environment variable of the API key is not set. The function raises it if the server refuses the
            key, does not know the model, or still fails after all the waits.
    """
    headers = {}
    if writer.key_env is not None:
        if not environment.get(writer.key_env):
            raise UserError(f"writer.key_env: {writer.key_env} is not set; export it with the API key")
        headers["Authorization"] = f"Bearer {environment[writer.key_env]}"

    def write(requests: Sequence[Request], done: Callable[[Request, Answer], None]) -> None:
        with httpx2.Client(headers=headers, timeout=TIMEOUT, limits=httpx2.Limits(max_connections=None)) as client:
            _Run(writer, client, requests, done).finish()

    return write, f"{writer.url} {writer.model}"


class _Run:
    """Threads that share a list of requests."""

    def __init__(
        self,
        writer: Writer,
        client: httpx2.Client,
        requests: Sequence[Request],
        done: Callable[[Request, Answer], None],
    ) -> None:
        self._writer, self._client, self._done = writer, client, done
        self._waiting, self._lock = iter(requests), threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._in_flight, self._noticed = 0, 0.0
        # Not a pool: at exit Python waits for a pool's threads, even after a second Ctrl-C.
        count = min(writer.parallel, len(requests))
        # Not join: before Python 3.13, a signal during a thread's join marks the thread as ended although it runs.
        self._ended = [threading.Event() for _ in range(count)]
        self._threads = [threading.Thread(target=self._run, args=(ended,), daemon=True) for ended in self._ended]

    def finish(self) -> None:
        try:
            for thread in self._threads:
                thread.start()
            for ended in self._ended:
                ended.wait()
        except BaseException:
            self._stop.set()
            if self._in_flight:
                stderr().print(f"Waiting for {plural(self._in_flight, 'answer')}; Ctrl-C again abandons them.")
            for thread, ended in zip(self._threads, self._ended, strict=True):
                if thread.ident is not None:
                    ended.wait()
            raise
        if self._error is not None:
            raise self._error

    def _run(self, ended: threading.Event) -> None:
        try:
            self._work()
        finally:
            ended.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                request = next(self._waiting, None)
            if request is None:
                return
            try:
                answer = self._ask_with_retries(request)
                if answer is not None:
                    self._done(request, answer)
            except BaseException as error:
                self._error = self._error or error
                self._stop.set()

    def _ask_with_retries(self, request: Request) -> Answer | None:
        """Return the answer to a request, which is repeated while the server fails; None if the run is stopped."""
        for wait in (*WAITS, None):
            try:
                with self._lock:
                    self._in_flight += 1
                try:
                    return self._ask(request)
                finally:
                    with self._lock:
                        self._in_flight -= 1
            except (httpx2.TransportError, _IncompleteError) as error:
                what, delay = str(error) or type(error).__name__, None
            except httpx2.HTTPStatusError as error:
                response = error.response
                what, delay = f"answers {_status(response)}", retry_after(response.headers.get("Retry-After"))
            if wait is None:
                raise UserError(
                    f"{self._writer.url}: {what}; given up after {plural(len(WAITS) + 1, 'attempt')}. Run the command "
                    "again when the server works: answered requests are not sent again"
                )
            seconds = wait * random.uniform(0.5, 1) if delay is None else delay
            self._notice(f"{self._writer.url}: {what}; trying again in {seconds:.3g} s")
            if self._stop.wait(seconds):
                return None
        raise AssertionError

    def _ask(self, request: Request) -> Answer:
        chat = "messages" in request.body
        assert self._writer.url is not None
        response = self._client.post(
            f"{self._writer.url.rstrip('/')}/{'chat/completions' if chat else 'completions'}",
            json=dict(request.body),
            headers={"Idempotency-Key": request.key},
        )
        if response.status_code == 200:
            return _answer(response, chat)
        self._raise_for_status(response)
        return Answer(_status(response), REFUSED)

    def _raise_for_status(self, response: httpx2.Response) -> None:
        """Raise `UserError` if every request would fail, `HTTPStatusError` if a later attempt may succeed."""
        url, status = self._writer.url, _status(response)
        if response.status_code in (401, 403):
            key = f"the key in {self._writer.key_env}" if self._writer.key_env else "a request without writer.key_env"
            raise UserError(f"{url}: the server refuses {key}: {status}")
        if response.status_code == 404:
            raise UserError(
                f"{url}: no such address, or no model '{self._writer.model}' there: {status}; check writer.url, which "
                "usually ends in /v1, and writer.model"
            )
        if "insufficient_quota" in response.text:
            raise UserError(f"{url}: the account's quota is exhausted: {status}")
        if response.status_code in TEMPORARY or response.status_code < 400:
            raise httpx2.HTTPStatusError(status, request=response.request, response=response)

    def _notice(self, line: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._noticed and now - self._noticed < PLAIN_INTERVAL:
                return
            self._noticed = now
        stderr().print(line, style="yellow")


def _status(response: httpx2.Response) -> str:
    """Return a response's status, and its error message if it has one."""
    status = f"{response.status_code} {response.reason_phrase}".strip()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return status
    return f"{status}: {' '.join(str(message).split())[:300]}"


def _answer(response: httpx2.Response, chat: bool) -> Answer:
    try:
        whole = response.json()
        choice, usage = whole["choices"][0], whole.get("usage") or {}
        text = choice["message"]["content"] if chat else choice["text"]
        reason = choice.get("finish_reason")
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _IncompleteError("the response is not a complete answer") from None
    return Answer(str(text or ""), None if reason is None else str(reason), *counts)


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header, a number or a date, asks to wait; None if it has neither."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(0.0, seconds), LONGEST_WAIT)
