"""A service behind a socket, from its first request to its last."""

import ipaddress
import signal
import socket
from contextlib import ExitStack
from types import FrameType

import uvicorn

from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr
from rmkv_cli.serving.api import create_app
from rmkv_cli.serving.service import Service

GRACE = 10.0  # seconds that answers have to end once the server is told to


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
        # The engine ends the answers itself; if it cannot, uvicorn cuts them off.
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=int(2 * GRACE))
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take in no more, and let what is running go on for a while; a second Ctrl-C ends it."""
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
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sends it again once all has ended
    try:
        server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
        stderr().print("ended", style="dim")
