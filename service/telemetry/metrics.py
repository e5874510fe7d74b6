"""Prometheus metrics: counts and times of calls, tokens, cache, load and alpha tables.

Owns the names, units and buckets of all metrics. They are in a separate registry, so several
servers can run in one process. Gauges are read at each scrape; events are counted when they happen.
Every label has a bounded number of values: no request ids, and every unknown method is `other`.
Knows nothing of gRPC and of the engine.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Literal, Protocol, get_args
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.requests import Delta, Event, Finished, FinishReason, Started

# From a small model on a CPU to a long prompt behind a full queue.
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10)
WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
CALL_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)

OTHER = "other"
"""Value of the label `method` for calls of unknown methods."""

ReloadOutcome = Literal["changed", "unchanged", "failed"]
"""Outcome of reading the directory of tables again. `failed`: unreadable, nothing changed."""


@dataclass(frozen=True)
class ServerLoad:
    """Load of the server at one moment. The fields are those of the GetLoad response."""

    running: int
    waiting: int
    admitted: int
    capacity: int
    kv_bytes_used: int
    kv_bytes_limit: int


class ServedTable(Protocol):
    """What the metrics show of an alpha table besides its name."""

    @property
    def sha256(self) -> str: ...  # noqa: D102


class ServedTables(Protocol):
    """The alpha tables at one moment, by name."""

    @property
    def tables(self) -> Mapping[str, ServedTable]:
        """Tables that are served."""

    @property
    def refused(self) -> Collection[str]:
        """Names of tables that cannot be used."""

    @property
    def default(self) -> str | None:
        """Name of the table for requests that name no method."""


class Metrics:
    """The metrics of one server. Safe to call from any thread."""

    def __init__(
        self, methods: Iterable[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`methods`: the known values of the label `method`; `clock`: returns seconds."""
        self.registry = registry = CollectorRegistry()
        self.clock = clock
        self._methods = frozenset(methods)
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "a2sf_requests_total",
            "Calls answered, by method and gRPC status code.",
            ("method", "code"),
            registry=registry,
        )
        self._duration = Histogram(
            "a2sf_request_duration_seconds",
            "From a call's arrival to its status, by method.",
            ("method",),
            buckets=CALL_BUCKETS_S,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "a2sf_time_to_first_token_seconds",
            "From a completion's arrival to its first token's way out.",
            buckets=WAIT_BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "a2sf_inter_token_seconds",
            "Between two tokens of a completion on their way out.",
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self.queue = Histogram(
            "a2sf_queue_seconds",
            "From a completion's submission to the start of reading its prompt.",
            buckets=WAIT_BUCKETS_S,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "a2sf_prompt_tokens_total",
            "Tokens of prompts that the engine began to read (prefill).",
            registry=registry,
        )
        self.completion_tokens = Counter(
            "a2sf_completion_tokens_total",
            "Tokens of completions that were on their way out (decode).",
            registry=registry,
        )
        self.evicted_tokens = Counter(
            "a2sf_evicted_tokens_total",
            "Tokens that finished completions had forgotten, the mean over heads.",
            registry=registry,
        )
        finished = Counter(
            "a2sf_completions_finished_total",
            "Completions that ended in the ordinary way, by reason.",
            ("reason",),
            registry=registry,
        )
        self.finished = {reason: finished.labels(reason.value) for reason in FinishReason}
        self.failed = Counter(
            "a2sf_completions_failed_total",
            "Completions that the engine failed at, each alone; the log has the cause.",
            registry=registry,
        )
        self._reloads = Counter(
            "a2sf_alpha_table_reloads_total",
            "Times that the directory of alpha tables was read again, by outcome.",
            ("outcome",),
            registry=registry,
        )
        # A rate needs a value of zero before the first event.
        for outcome in get_args(ReloadOutcome):
            self._reloads.labels(outcome)
        for method in sorted(self._methods):
            self._requests.labels(method, "OK")
            self._duration.labels(method)

    def serving(
        self,
        *,
        model: str,
        device: str,
        dtype: str,
        load: Callable[[], ServerLoad],
        tables: Callable[[], ServedTables],
    ) -> None:
        """Start to export model, load and tables. Call it once, after loading.

        Each scrape calls `load` and `tables` in another thread: they must neither block nor raise.
        """
        info = {"id": model, "device": device, "dtype": dtype, "version": __version__}
        self.registry.register(_Scraped(info, load, tables))

    def answered(self, method: str, code: str, seconds: float) -> None:
        """Count a call that ended. `code`: name of the gRPC status code, such as `CANCELLED`."""
        known = method if method in self._methods else OTHER
        self._requests.labels(known, code).inc()
        self._duration.labels(known).observe(seconds)

    def completion(self) -> "CompletionMetrics":
        """Start to measure a completion; its time to the first token starts now."""
        return CompletionMetrics(self)

    def reloaded(self, outcome: ReloadOutcome) -> None:
        """Count a read of the directory of tables."""
        self._reloads.labels(outcome).inc()


class CompletionMetrics:
    """Measures one completion. Pass each event here before it is written to the client.

    A slow reader delays the events, so the times are those of the response, not of the engine.
    """

    __slots__ = ("_last", "_metrics", "_step")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = metrics.clock()
        self._step = metrics.time_to_first_token

    def failed(self) -> None:
        """Count that the engine failed at this completion."""
        self._metrics.failed.inc()

    def event(self, event: Event) -> None:
        """Count one event of the stream; takes 1.3 microseconds per token."""
        metrics = self._metrics
        if type(event) is Delta:
            # Text that was withheld until a time limit comes without a token.
            if event.token_ids:
                now = metrics.clock()
                self._step.observe(now - self._last)
                self._last, self._step = now, metrics.inter_token
                metrics.completion_tokens.inc(len(event.token_ids))
        elif type(event) is Started:
            metrics.prompt_tokens.inc(event.prompt_tokens)
        elif type(event) is Finished:
            metrics.queue.observe(event.timings.queue_s)
            metrics.evicted_tokens.inc(event.cache.evicted_tokens)
            metrics.finished[event.reason].inc()


class _Scraped(Collector):
    """Collects the metrics that are read at each scrape."""

    def __init__(
        self,
        info: dict[str, str],
        load: Callable[[], ServerLoad],
        tables: Callable[[], ServedTables],
    ) -> None:
        self._info = info
        self._load = load
        self._tables = tables

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics."""
        yield InfoMetricFamily("a2sf_model", "What is served, and by which version.", self._info)
        load = self._load()
        for name, meaning, value in (
            ("requests_running", "Requests that hold a row or are being read.", load.running),
            ("requests_waiting", "Requests that wait for a row.", load.waiting),
            ("requests_admitted", "Completions under way, to the last event.", load.admitted),
            ("requests_capacity", "Completions that may be under way at most.", load.capacity),
            ("kv_used_bytes", "Memory of the cache's slots that hold tokens.", load.kv_bytes_used),
            ("kv_limit_bytes", "Memory that the cache takes in all.", load.kv_bytes_limit),
        ):
            yield GaugeMetricFamily(f"a2sf_{name}", meaning, value)
        served = self._tables()
        yield GaugeMetricFamily(
            "a2sf_alpha_tables_refused",
            "Alpha tables that cannot be used.",
            len(served.refused),
        )
        families = InfoMetricFamily(
            "a2sf_alpha_table", "Alpha tables served now.", labels=("name", "sha256", "default")
        )
        for name, table in served.tables.items():
            default = "true" if name == served.default else "false"
            families.add_metric((), {"name": name, "sha256": table.sha256, "default": default})
        yield families


@dataclass(frozen=True)
class MetricsServer:
    """An HTTP server of metrics, in a separate thread until closed."""

    _server: WSGIServer
    _thread: Thread

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return self._server.server_port

    def close(self) -> None:
        """Stop the server. Takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(metrics: Metrics, host: str, port: int) -> MetricsServer:
    """Serve `metrics` over plain HTTP; port 0 lets the system choose.

    Raises InvalidArgument if the address cannot be bound.
    """
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise InvalidArgument(
            "--metrics-port", f"cannot listen on {host}, port {port}: {error.strerror}"
        ) from error
    return MetricsServer(server, thread)
