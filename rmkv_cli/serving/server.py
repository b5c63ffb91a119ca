"""Run a service on a socket until a signal ends it."""

import errno
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

GRACE = 10.0  # seconds for answers to finish during shutdown
CONNECTIONS = 1000  # in addition to one for each text in a lane or in the queue
BACKLOG = 1024  # connections waiting to be accepted
ACCEPTED = 16  # connections accepted at a time
FILES = 64 + 4 * ACCEPTED  # files beside connections: the process's own, just accepted ones, ones not closed yet


class Server(uvicorn.Server):
    """A uvicorn server that shuts its service down as soon as a signal arrives."""

    def __init__(self, service: Service, key: str | None, host: str = "127.0.0.1") -> None:
        """Create a server for the service.

        Args:
            service: the service.
            key: API key that clients must send; None: no key.
            host: where the server listens. Without a key, it answers only to that name and this machine's own names,
                or to any name if other machines can reach it.
        """
        self._engine = service.engine
        hosts = {"localhost", "127.0.0.1", "[::1]", in_url(host).lower()} if is_loopback(host) else ()
        app = create_app(service, key, hosts)
        self.interrupted = False
        """Whether Ctrl-C ended the server."""
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
        """Accept no more requests and give running ones time to finish; a second signal ends them."""
        self.interrupted |= sig == signal.SIGINT
        self._engine.shut(0 if self.should_exit else GRACE)
        super().handle_exit(sig, frame)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that is bound to the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def in_url(host: str) -> str:
    """Return the host as it appears in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound but not yet listening; raise `UserError` if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            undo.pop_all()
        return bound
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is already in use; choose another with --port") from None
        raise UserError(f"cannot listen on {host}:{port}: {str(error.strerror).lower()}") from None


def serve(service: Service, bound: socket.socket, key: str | None, host: str) -> None:
    """Serve on a socket bound to the host until SIGTERM, then return; after Ctrl-C, raise `KeyboardInterrupt`."""
    server = Server(service, key, host)
    # Install uvicorn's handlers before uvicorn does, so that no signal during its start is lost.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with service.engine:  # outside uvicorn, which would log an error as a traceback
            bound.listen(BACKLOG)  # clients may connect as soon as the next line appears
            stderr().print(f"serving {service.name} at http://{in_url(host)}:{bound.getsockname()[1]}; Ctrl-C stops it")
            server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stderr().print("ended", style="dim")
    if server.interrupted:
        raise KeyboardInterrupt


def _most_connections(limits: Limits) -> int:
    """Return the largest number of connections that leaves enough file descriptors to accept one more."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(ACCEPTED, min(CONNECTIONS + limits.lanes + limits.queue, files - FILES))
