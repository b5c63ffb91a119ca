"""A service behind a socket, from its first request to its last."""

import ipaddress
import resource
import signal
import socket
from contextlib import ExitStack
from functools import partial
from types import FrameType

import uvicorn

from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr
from rmkv_cli.serving.api import create_app
from rmkv_cli.serving.connection import Connection
from rmkv_cli.serving.limits import Limits
from rmkv_cli.serving.service import Service

GRACE = 10.0  # seconds that answers have to end once the server is told to
CONNECTIONS = 1000  # beyond one for each text in a lane or in the queue
BACKLOG = 1024  # connections waiting to be accepted
ACCEPTED = 16  # connections accepted at a time
FILES = 64 + 4 * ACCEPTED  # files beside connections: the process's own, just accepted ones, ones not closed yet


class Server(uvicorn.Server):
    """A uvicorn server that tells its service at once when a signal ends it."""

    def __init__(self, service: Service, key: str | None, host: str = "127.0.0.1") -> None:
        """Make a server of the service.

        Args:
            service: what is served.
            key: what clients must show; None: nothing.
            host: where it listens; without a key it answers under that and this machine's own names alone, or under
                any if others can reach it.
        """
        self._engine = service.engine
        hosts = {"localhost", "127.0.0.1", "[::1]", in_url(host).lower()} if is_loopback(host) else ()
        app = create_app(service, key, hosts)
        self.interrupted = False
        """Whether Ctrl-C ended it."""
        config = uvicorn.Config(
            app,
            http=partial(Connection, limits=service.limits, most=_most_connections(service.limits)),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            workers=1,
            proxy_headers=False,
            log_config=None,
            log_level="error",  # clients could flood the log with warnings
            access_log=False,
            backlog=ACCEPTED,
            timeout_graceful_shutdown=int(2 * GRACE),  # the engine ends answers itself; this is the fallback
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        # asyncio accepts `backlog` connections at once, which may exceed the number of available files.
        for bound in sockets or ():
            bound.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take in no more, and let what is running go on for a while; a second Ctrl-C ends it."""
        self.interrupted |= sig == signal.SIGINT
        self._engine.shut(0 if self.should_exit else GRACE)
        super().handle_exit(sig, frame)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a server that is bound to the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def in_url(host: str) -> str:
    """Return the host as an address has it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet; raise `UserError` if there is no such place, or it is
    taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            undo.pop_all()
        return bound
    except OSError as error:
        raise UserError(f"{host}:{port}: cannot be listened at: {str(error.strerror).lower()}") from None


def serve(service: Service, bound: socket.socket, key: str | None, host: str) -> None:
    """Serve at a socket bound to the host until SIGTERM, after which it returns, or Ctrl-C, which is raised again."""
    server = Server(service, key, host)
    # Install uvicorn's handlers before uvicorn does, so that no signal during its start is lost.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with service.engine:  # outside uvicorn, which would log an error as a traceback
            bound.listen(BACKLOG)  # clients may connect as soon as the next line appears
            stderr().print(f"serving {service.name} at http://{in_url(host)}:{bound.getsockname()[1]}; Ctrl-C ends it")
            server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stderr().print("ended", style="dim")
    if server.interrupted:
        raise KeyboardInterrupt


def _most_connections(limits: Limits) -> int:
    """Return the most connections that leave enough files open to accept one more."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(ACCEPTED, min(CONNECTIONS + limits.lanes + limits.queue, files - FILES))
