"""A client's connection: how many there are, how long each may keep the server waiting, and errors below HTTP."""

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
"""Time in which a request's head must have arrived, or `max_seconds` if that is less."""
ANSWER_SECONDS = 30.0
"""Time beyond its request's in which an answer must have been received."""


class Connection(H11Protocol):
    """A connection that is cut off if it keeps the server waiting, or is silent while there are too many.

    uvicorn itself bounds the time between two requests alone. Its `limit_concurrency` refuses requests, and closes no
    silent connection.
    """

    def __init__(self, *how: Any, limits: Limits, most: int, **more: Any) -> None:
        """Begin as uvicorn does; `most`: how many connections there may be at once."""
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
        """Whether it has asked nothing that is yet to be answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request; if there are too many connections, close the one that was silent longest."""
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
                    ApiError(503, f"all {self._most} connections are taken; try again later", "too_many_connections")
                )

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._wait(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what arrives, unless the connection was refused: who is still sending then has time to read why."""
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """Begin to answer once a request's head is there."""
        super().handle_events()
        if self.cycle is not self._answering:
            self._answering = self.cycle
            self._wait(self._answer_seconds)

    def on_response_complete(self) -> None:
        """Wait for the next request; also for the client to take what it was sent."""
        self._since = self.loop.time()
        self._wait(self._head_seconds)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Tell a client that speaks no HTTP so, in the form of all errors."""
        error = sys.exception()
        assert isinstance(error, h11.RemoteProtocolError)
        status, message = error.error_status_hint, f"the request is not valid HTTP: {error}"
        self._refuse(ApiError(status, "the headers are too large" if status == 431 else message, "invalid_http"))

    def shutdown(self) -> None:
        """End it once its answer is sent; now, if its request has not arrived."""
        if not self.silent and self.cycle.more_body:
            self.transport.abort()
        else:
            super().shutdown()

    def _wait(self, seconds: float | None) -> None:
        """Cut it off after so long, unless something happens before."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun, and have the client close."""
        self._refused = True
        if not self.silent:  # what the application answers is no longer sent
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
