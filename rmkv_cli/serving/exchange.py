"""A request's jobs, between the engine's thread and the event loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rmkv_cli.serving.choice import Said
from rmkv_cli.serving.engine import Engine
from rmkv_cli.serving.errors import ApiError, as_api_error
from rmkv_cli.serving.jobs import Done, Event, Job

T = TypeVar("T")


class Exchange:
    """What the jobs of one request tell, in the order in which it happens."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()
        self.read = self.written = 0
        """Tokens of the jobs that are done."""

    def send(self, event: Event) -> None:
        """Hand an event over from the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def submit(self, engine: Engine, jobs: Sequence[Job]) -> None:
        """Hand the jobs, which `send` here, to the engine; errors as in its `submit`: then nothing is kept."""
        try:
            engine.submit(jobs)
        except BaseException:
            for job in jobs:
                if job.keep is not None:
                    job.keep(None)
            raise
        self._jobs = jobs

    def cancel(self) -> None:
        """Have the engine let go of what is not yet done."""
        for job in self._jobs:
            job.cancelled = True

    async def said(self) -> AsyncIterator[Said]:
        """Yield what is said until all jobs are done; raise `ApiError` if one of them fails."""
        left = len(self._jobs)
        while left:
            event = await self._events.get()
            if isinstance(event, Said):
                yield event
            elif isinstance(event, Done):
                self.read, self.written, left = self.read + event.read, self.written + event.written, left - 1
            else:
                raise as_api_error(event)


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends them, the exchange is over."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return what the work gives; raise `ApiError` 499, which nobody reads, as soon as the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
