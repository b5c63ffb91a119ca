"""Bound the number of connections and the time each may keep the server waiting; answer malformed HTTP."""

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from rmkv_cli.serving.errors import ApiError
from rmkv_cli.serving.gate import BODY_SECONDS
from rmkv_cli.serving.limits import Limits

HEAD_SECONDS = 10.0
"""Seconds for a request's headers to arrive; `max_seconds` if that is less."""
ANSWER_SECONDS = 30.0
"""Seconds, beyond the request's own time, for the client to receive the answer."""


class Connection(H11Protocol):
    """A connection that is closed if it keeps the server waiting, or is silent while there are too many connections.

    uvicorn itself bounds only the time between two requests. Its `limit_concurrency` refuses requests but closes no
    silent connection.
    """

    def __init__(self, *how: Any, limits: Limits, most: int, **more: Any) -> None:
        """Create a connection as uvicorn does; at most `most` may be open at once."""
        super().__init__(*how, **more)
        self._most = most
        self._head_seconds = min(HEAD_SECONDS, limits.max_seconds)
        self._answer_seconds = BODY_SECONDS + limits.max_seconds + ANSWER_SECONDS
        self._deadline: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        self._since = self.loop.time()
        self._refused = False

    @property
    def silent(self) -> bool:
        """Whether no request on this connection awaits an answer."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request; if there are too many connections, close the one that has been silent longest."""
        super().connection_made(transport)
        self._wait(self._head_seconds)
        if len(self.connections) > self._most:
            others = [x for x in self.connections if isinstance(x, Connection) and x.silent and x is not self]
            if others:
                oldest = min(others, key=lambda x: x._since)
                self.connections.discard(oldest)
                oldest.transport.abort()
            else:
                self._refuse(
                    ApiError(503, f"all {self._most} connections are in use; try again later", "too_many_connections")
                )

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        self._wait(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process received bytes; discard them after a refusal, which gives the client time to read the reason."""
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """Begin to answer once a request's headers have arrived."""
        super().handle_events()
        if self.cycle is not self._answering:
            self._answering = self.cycle
            self._wait(self._answer_seconds)

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the client to receive the answer."""
        self._since = self.loop.time()
        self._wait(self._head_seconds)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with an error of the usual form."""
        error = sys.exception()
        assert isinstance(error, h11.RemoteProtocolError)
        status, message = error.error_status_hint, f"the request is not valid HTTP: {error}"
        self._refuse(ApiError(status, "the headers are too large" if status == 431 else message, "invalid_http"))

    def shutdown(self) -> None:
        """Close the connection once its answer is sent, or now if the request is still arriving."""
        if not self.silent and self.cycle.more_body:
            self.transport.abort()
        else:
            super().shutdown()

    def _wait(self, seconds: float | None) -> None:
        """Close the connection after `seconds` unless called again; None: never."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun, and ask the client to close."""
        self._refused = True
        if not self.silent:  # discard the application's answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._wait(self._head_seconds)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            answer = h11.Response(status_code=error.status, headers=headers)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
