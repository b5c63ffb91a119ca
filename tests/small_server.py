"""A real server on a local port, for tests."""

import gc
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import httpx2
import openai

from rmkv_cli.model import RMKV
from rmkv_cli.serving import Limits, Server, Service, bind
from rmkv_cli.serving.choice import Choice
from rmkv_cli.tokenizer import Tokenizer


@dataclass
class Running:
    """The server in a thread, with methods to send requests."""

    model: RMKV
    tokenizer: Tokenizer
    url: str
    service: Service
    server: Server

    def client(self, key="none", **more):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60} | more)

    def ask(self, method, path, **more):
        return httpx2.request(method, self.url + path, timeout=60, trust_env=False, **more)

    def connect(self):
        """Return a fresh connection; waiting longer than a minute for the server fails the test."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def begin(self, path, body):
        """Send a request; return the connection on which the answer will arrive."""
        connection, content = self.connect(), json.dumps(body)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        return connection

    def metric(self, name):
        """Return the sum of a metric's values over its labels."""
        lines = [line.rpartition(" ") for line in self.ask("GET", "/metrics").text.splitlines()]
        return sum(float(value) for key, _, value in lines if key == name or key.startswith(name + "{"))

    def unfinished(self):
        """Number of texts that wait, are being read or are being generated."""
        return self.metric("rmkv_lanes_busy") + self.metric("rmkv_queue_length")


@contextmanager
def running(model, tokenizer, key=None, host="127.0.0.1", variants=None, **limits):
    service = Service(model, tokenizer, "small", Limits(**limits), variants)
    server = Server(service, key, host)
    with bind(host, 0) as bound, service.engine:
        bound.listen()  # a client need not wait until the thread does so
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield Running(model, tokenizer, f"http://{host}:{bound.getsockname()[1]}", service, server)
        finally:
            service.engine.shut(0)
            server.should_exit = True
            thread.join()


def wait_for(condition):
    while not condition():  # pytest's time limit ends it
        time.sleep(0.02)


@contextmanager
def all_texts_freed():
    """Check that every text begun in this block is freed without the garbage collector."""
    gc.collect()
    earlier = WeakSet(kept for kept in gc.get_objects() if type(kept) is Choice)  # left by other servers
    gc.disable()
    try:
        yield
        wait_for(lambda: not any(type(kept) is Choice and kept not in earlier for kept in gc.get_objects()))
    finally:
        gc.enable()
