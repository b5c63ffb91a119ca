"""A small recipe for synthetic data, and a loopback server that bills each answer and fails as real ones do."""

import json
import random
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rmkv_cli.config import DataRecipe

FAULTS = "503", "429", "cut", "closed"


def a_recipe(**keys):
    """Return a recipe of 40 requests, with these additional keys."""
    return DataRecipe.model_validate(
        {
            "count": 40,
            "writer": {"model": "m"},
            "prompt": "Write about {topic}.",
            "slots": {"topic": {"values": ["cats", "dogs", "trees"]}},
            "filters": {"near_duplicates": 0},
        }
        | keys
    )


def echo(body):
    """Return the answer to a request: its prompt and seed, so that all answers differ."""
    asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return f"{asked} Said with seed {body['seed']} by {random.Random(body['seed']).random()}."


class Paid:
    """Requests that the server received and billed. It honours the header Idempotency-Key: each key is billed once."""

    def __init__(self, answer, faults, share, seed):
        self.answer, self.faults, self.share, self.seed = answer, faults, share, seed
        self.received = []  # keys, in order
        self.bodies = []
        self.headers = []
        self.billed = Counter()
        self.sent = Counter()  # whole answers
        self.known = {}
        self.lock = threading.Lock()
        self.hold = threading.Event()
        self.hold.set()
        self.url = None

    def fault(self, key, body):
        """Return the fault of this attempt, or None; it does not depend on the order of the requests."""
        draw = random.Random(f"{self.seed} {body['seed']} {self.received.count(key)}")
        return draw.choice(self.faults) if draw.random() < self.share else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        paid = self.server.paid
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]
        with paid.lock:
            paid.received.append(key)
            paid.bodies.append((self.path, body))
            paid.headers.append(dict(self.headers))
            fault = paid.fault(key, body)
        paid.hold.wait()
        if fault == "closed":
            self.close_connection = True
            return
        if fault is not None and fault != "cut":
            status, _, words = fault.partition(" ")
            self.reply(int(status), {"error": {"message": words or "try later"}}, {"Retry-After": "0"})
            return
        with paid.lock:
            if key not in paid.known:
                paid.billed[key] += 1
                text = paid.answer(body)
                content = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
                usage = {"prompt_tokens": 3, "completion_tokens": 5}
                paid.known[key] = {"choices": [{**content, "finish_reason": "stop"}], "usage": usage}
        self.reply(200, paid.known[key], cut=fault == "cut")
        if fault != "cut":
            with paid.lock:
                paid.sent[key] += 1

    def reply(self, status, value, headers=(), cut=False):
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, header in dict(headers).items():
            self.send_header(name, header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        """Print nothing: killed clients leave broken connections."""


@contextmanager
def small_writer(answer=echo, faults=FAULTS, share=0.0, seed=0):
    """Run the server in a thread; each request meets one of the faults with this probability."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.paid = Paid(answer, faults, share, seed)
    server.paid.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.paid
    finally:
        server.paid.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()
