"""What every request passes first: whose it may be, how large it is, and how it is counted."""

import re
import secrets
import time
from collections.abc import Collection

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rmkv_cli.serving.errors import ApiError
from rmkv_cli.serving.metrics import Metrics

OPEN = {"/", "/health"}


class Gate:
    """ASGI middleware: asks for the key, looks at the host's name and the body's size, counts answers.

    Where there is no key, only requests to the names in `hosts`, in lower case, are let in, if any are given: a page of
    another site could else reach a server on this machine under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body: int, key: str | None, hosts: Collection[str]) -> None:
        self._app, self._metrics, self._max_body = app, metrics, max_body
        self._key, self._hosts = key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, size = time.monotonic(), 499, 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def measure() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:  # FastAPI hands on what is raised only if it is its own
                raise HTTPException(413, f"the body is larger than {self._max_body} bytes")
            return message

        refusal = self._refusal(scope)
        try:
            await (refusal.response() if refusal else self._app)(scope, measure, note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._key is None:
            name = re.sub(r":\d+$", "", headers.get("host", "")).lower()
            if self._hosts and name not in self._hosts:
                return ApiError(403, "this server answers to " + ", ".join(sorted(self._hosts)), "wrong_host")
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        known = secrets.compare_digest(given.strip().encode("latin-1"), self._key.encode())
        if scope["path"] in OPEN or (scheme.lower() == "bearer" and known):
            return None
        message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        return ApiError(401, message, "invalid_api_key")
