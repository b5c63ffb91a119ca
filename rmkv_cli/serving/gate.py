"""Check every request first: its key, host and size; and count it."""

import asyncio
import re
import secrets
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rmkv_cli.serving.errors import ApiError
from rmkv_cli.serving.limits import Limits
from rmkv_cli.serving.metrics import Metrics

OPEN = {"/", "/health"}
BODY_SECONDS = 60.0
"""Seconds for a body to arrive; `max_seconds` if that is less."""
BODIES = 4
"""Bound of all bodies in memory together, as a multiple of the largest permitted body."""


class Gate:
    """ASGI middleware that checks the key and the host's name, bounds bodies and their time, and counts answers.

    Without a key, only requests to the names in `hosts` (lower case) pass, if there are any. Otherwise a page of
    another site could reach a server on this machine under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits, key: str | None, hosts: Collection[str]) -> None:
        self._app, self._metrics, self._max_body = app, metrics, limits.max_body
        self._body_seconds = min(BODY_SECONDS, limits.max_seconds)
        self._key, self._hosts = None if key is None else key.encode(), hosts
        self._bytes = 0  # bodies of all requests without an answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        start, status, size = time.monotonic(), 499, 0
        last: float | None = asyncio.get_running_loop().time() + self._body_seconds

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def measure() -> Message:
            nonlocal size, last
            try:
                async with asyncio.timeout_at(last):
                    message = await receive()
            except TimeoutError:
                late = f"the body took longer than {self._body_seconds:g} s to arrive"
                raise ApiError(408, late, "timeout") from None
            if not message.get("more_body"):
                last = None  # the next message is the client's disconnect
            size += (new := len(message.get("body", b"")))
            self._bytes += new
            if size > self._max_body:
                raise ApiError(413, f"the body is larger than {self._max_body} bytes", "too_large")
            if self._bytes > BODIES * self._max_body:
                raise ApiError(429, "too many large requests at once; try again later", "too_many_bytes")
            return message

        refusal = self._refusal(scope)
        try:
            await (refusal.response() if refusal else self._app)(scope, measure, note)
        finally:
            self._bytes -= size
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._key is None:
            name = re.sub(r":\d+$", "", headers.get("host", "")).lower()
            if self._hosts and name not in self._hosts:
                return ApiError(403, f"the Host header should name {' or '.join(sorted(self._hosts))}", "wrong_host")
            return None
        # Split bytes, not text: decoded as latin-1, a UTF-8 character can contain a space.
        scheme, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
        known = secrets.compare_digest(given.strip(), self._key)
        if scope["path"] in OPEN or (scheme.lower() == b"bearer" and known):
            return None
        message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        return ApiError(401, message, "invalid_api_key")
