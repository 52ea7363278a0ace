"""What is counted, as Prometheus reads it. Labels are of small fixed sets: no adapter, no key, no path of a client."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from randbasis.serve.requests import Finish, Request

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTED = ("loads", "hits", "misses", "evictions", "expanded", "expansion_seconds")
"""Numbers of the bank that only grow; all else that it tells may fall."""


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "randbasis"}
        self._http = Counter("http_requests", "Requests over HTTP.", ["route", "status"], **own)
        self._answers = Counter("answers", "Answers that ended, by why.", ["finish"], **own)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", **own)
        self._generated = Counter("generated_tokens", "Tokens of answers.", **own)
        self._first = Histogram("time_to_first_token_seconds", "From request to first token.", buckets=SECONDS, **own)
        self._next = Histogram("inter_token_seconds", "From one token to the next.", buckets=SECONDS, **own)
        self._whole = Histogram("http_request_seconds", "Of a whole request.", ["route"], buckets=SECONDS, **own)
        self._steps = Counter("steps", "Passes through the model.", **own)
        self._rows = Counter("step_requests", "Requests in all passes.", **own)
        self._packed = Counter("step_tokens", "Tokens in all passes.", **own)
        self._waiting = Gauge("requests_waiting", "Requests that wait for their first pass.", **own)
        self._running = Gauge("requests_running", "Requests in the batch.", **own)

    def watch(self, counts: Callable[[], tuple[int, int]]) -> None:
        """Where the requests that wait and run are asked for, when somebody reads."""
        self._waiting.set_function(lambda: counts()[0])
        self._running.set_function(lambda: counts()[1])

    def watch_bank(self, stats: Callable[[], Mapping[str, float]]) -> None:
        """Where the numbers of the bank are asked for."""
        self.registry.register(_BankNumbers(stats))

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def http(self, route: str, status: int, seconds: float) -> None:
        """A request over HTTP was answered; ``route`` is the path as the app declares it."""
        self._http.labels(route, str(status)).inc()
        self._whole.labels(route).observe(seconds)

    def step(self, requests: int, tokens: int) -> None:
        """A pass through the model begins."""
        self._steps.inc()
        self._rows.inc(requests)
        self._packed.inc(tokens)

    def tokens(self, request: Request, count: int) -> None:
        """Tokens came."""
        if count:
            now = time.monotonic()
            if request.seen:
                self._next.observe(now - request.seen)
            else:
                self._prompt.inc(len(request.prompt))
                self._first.observe(now - request.created)
            request.seen = now
            self._generated.inc(count)

    def ended(self, request: Request, finish: Finish) -> None:
        """An answer ended."""
        self._answers.labels(finish).inc()


class _BankNumbers:
    """The bank keeps its own numbers; they are read where they are asked for."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        for name, value in self._stats().items():
            if name in COUNTED:
                yield CounterMetricFamily(f"randbasis_bank_{name}", f"Of the bank: {name}.", value=value)
            else:
                yield GaugeMetricFamily(f"randbasis_bank_{name}", f"Of the bank: {name}.", value=value)
