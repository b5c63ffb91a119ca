"""Count what Prometheus monitors."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Metrics of a server, in their own registry, so that two servers in one process stay separate."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, registry=self.registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, registry=self.registry)

        def histogram(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(name, what, labels, registry=self.registry, buckets=SECONDS)

        self.requests = counter("rmkv_requests", "Requests answered; 499: the client disconnected", "route", "status")
        self.read = counter("rmkv_tokens_read", "Tokens read, in prompts and for memories")
        self.written = counter("rmkv_tokens_written", "Tokens generated")
        self.queue = gauge("rmkv_queue_length", "Texts that wait for a lane or whose prompts are being read")
        self.busy = gauge("rmkv_lanes_busy", "Lanes in use")
        self.lanes = gauge("rmkv_lanes", "Lanes available in total")
        self.memories = gauge("rmkv_memories", "Named memories")
        self.seconds = histogram("rmkv_request_seconds", "Time to the end of an answer", "route")
        self.first = histogram("rmkv_first_token_seconds", "Time from a request to its first token")

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
