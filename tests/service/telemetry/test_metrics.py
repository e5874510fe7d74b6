"""Prometheus metrics: names, units, bounded labels, and values that agree with the stream."""

import math
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from a2sf.errors import InvalidArgument
from a2sf.policy import EffectivePolicy
from a2sf.requests import (
    CacheStatistics,
    Delta,
    Event,
    Finished,
    FinishReason,
    Started,
    Timings,
    Usage,
)
from service.telemetry.metrics import Metrics, MetricsServer, serve_metrics

METHODS = ("StreamGenerate", "GetModel")


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class FakeLoad:
    running: int = 2
    waiting: int = 3
    admitted: int = 6
    capacity: int = 72
    kv_bytes_used: int = 1000
    kv_bytes_limit: int = 4000


@dataclass(frozen=True)
class FakeTable:
    sha256: str


@dataclass(frozen=True)
class FakeTables:
    tables: dict[str, FakeTable] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    default: str | None = None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(METHODS, clock=clock)


@pytest.fixture
def served(metrics: Metrics) -> Iterator[MetricsServer]:
    server = serve_metrics(metrics, "127.0.0.1", 0)
    yield server
    server.close()


def scrape(server: MetricsServer) -> str:
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def started(prompt_tokens: int = 7) -> Started:
    policy = EffectivePolicy(
        method="h2o",
        alpha=((1.0,),),
        budget=8,
        head_budgets=((8,),),
        recent=2,
        head_recents=((2,),),
        sinks=4,
        prefill_chunk=0,
    )
    return Started(request_id="r", policy=policy, prompt_tokens=prompt_tokens, seed=0)


def delta(tokens: int = 1) -> Delta:
    return Delta(request_id="r", text="x", token_ids=(5,) * tokens)


def finished(reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished(
        request_id="r",
        reason=reason,
        matched_stop=None,
        usage=Usage(prompt_tokens=7, completion_tokens=3),
        cache=CacheStatistics(
            budget=8, kept_tokens=8, evicted_tokens=4, kv_bytes=64, kv_bytes_full=128
        ),
        timings=Timings(queue_s=0.25, prefill_s=0.5, decode_s=1.0),
    )


def test_a_stream_is_counted_while_it_runs(metrics: Metrics, clock: Clock) -> None:
    watch = metrics.completion()
    for wait, event in (
        (1.0, started()),
        (2.0, delta()),
        (0.04, delta()),
        (0.04, delta()),
        (5.0, delta(tokens=0)),
        (0.0, finished(FinishReason.TIME_LIMIT)),
    ):
        clock.now += wait
        watch.event(event)
    observed = {
        name: value(metrics, f"a2sf_{name}")
        for name in (
            "prompt_tokens_total",
            "completion_tokens_total",
            "evicted_tokens_total",
            "time_to_first_token_seconds_count",
            "time_to_first_token_seconds_sum",
            "inter_token_seconds_count",
            "inter_token_seconds_sum",
            "queue_seconds_count",
            "queue_seconds_sum",
        )
    }
    assert observed == pytest.approx(
        {
            "prompt_tokens_total": 7,
            "completion_tokens_total": 3,
            "evicted_tokens_total": 4,
            "time_to_first_token_seconds_count": 1,
            "time_to_first_token_seconds_sum": 3.0,
            "inter_token_seconds_count": 2,
            "inter_token_seconds_sum": 0.08,
            "queue_seconds_count": 1,
            "queue_seconds_sum": 0.25,
        }
    )
    for reason in FinishReason:
        expected = float(reason is FinishReason.TIME_LIMIT)
        name = "a2sf_completions_finished_total"
        assert value(metrics, name, reason=reason.value) == expected


def test_tokens_of_a_cancelled_completion_are_counted(metrics: Metrics) -> None:
    watch = metrics.completion()
    watch.event(started())
    watch.event(delta())
    assert value(metrics, "a2sf_prompt_tokens_total") == 7
    assert value(metrics, "a2sf_completion_tokens_total") == 1
    assert value(metrics, "a2sf_queue_seconds_count") == 0


def test_calls_are_counted_by_method_and_code(metrics: Metrics) -> None:
    metrics.answered("StreamGenerate", "OK", 2.0)
    metrics.answered("StreamGenerate", "RESOURCE_EXHAUSTED", 0.001)
    name = "a2sf_requests_total"
    assert value(metrics, name, method="StreamGenerate", code="OK") == 1
    assert value(metrics, name, method="StreamGenerate", code="RESOURCE_EXHAUSTED") == 1
    assert value(metrics, name, method="GetModel", code="OK") == 0
    seconds = "a2sf_request_duration_seconds"
    assert value(metrics, f"{seconds}_count", method="StreamGenerate") == 2
    assert value(metrics, f"{seconds}_bucket", method="StreamGenerate", le="0.005") == 1


def test_unknown_methods_share_one_label(metrics: Metrics) -> None:
    for number in range(100):
        metrics.answered(f"Guess{number}", "UNIMPLEMENTED", 0.0)
    text = {
        sample.labels["method"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "method" in sample.labels
    }
    assert text == {*METHODS, "other"}


def test_table_reloads_are_counted_by_outcome(metrics: Metrics) -> None:
    metrics.reloaded("changed")
    name = "a2sf_alpha_table_reloads_total"
    assert value(metrics, name, outcome="changed") == 1
    assert value(metrics, name, outcome="failed") == 0


def test_load_is_read_at_each_scrape(metrics: Metrics, served: MetricsServer) -> None:
    assert "a2sf_requests_running" not in scrape(served)
    loads = [FakeLoad(), replace(FakeLoad(), running=5)]
    metrics.serving(
        model="m", device="cpu", dtype="float32", load=lambda: loads.pop(0), tables=FakeTables
    )
    first, second = scrape(served), scrape(served)
    for line in (
        "a2sf_requests_running 2.0",
        "a2sf_requests_waiting 3.0",
        "a2sf_requests_admitted 6.0",
        "a2sf_requests_capacity 72.0",
        "a2sf_kv_used_bytes 1000.0",
        "a2sf_kv_limit_bytes 4000.0",
    ):
        assert line in first.splitlines()
    assert "a2sf_requests_running 5.0" in second.splitlines()


def test_metrics_list_only_the_tables_served_now(metrics: Metrics) -> None:
    state = FakeTables({"a": FakeTable("11"), "b": FakeTable("22")}, ("bad",), "b")
    states = [state, FakeTables({"b": FakeTable("33")})]
    metrics.serving(
        model="m", device="cpu", dtype="float32", load=FakeLoad, tables=lambda: states[0]
    )

    def observed() -> set[tuple[str, str, str]]:
        return {
            (s.labels["name"], s.labels["sha256"], s.labels["default"])
            for family in metrics.registry.collect()
            for s in family.samples
            if s.name == "a2sf_alpha_table_info" and s.value == 1
        }

    assert observed() == {("a", "11", "false"), ("b", "22", "true")}
    assert value(metrics, "a2sf_alpha_tables_refused") == 1
    del states[0]
    assert observed() == {("b", "33", "false")}
    assert value(metrics, "a2sf_alpha_tables_refused") == 0


def test_metrics_name_the_model_and_the_version(metrics: Metrics) -> None:
    from a2sf import __version__

    metrics.serving(
        model="org/model", device="cuda", dtype="bfloat16", load=FakeLoad, tables=FakeTables
    )
    labels = {"id": "org/model", "device": "cuda", "dtype": "bfloat16", "version": __version__}
    assert value(metrics, "a2sf_model_info", **labels) == 1


def test_every_metric_has_our_prefix_a_base_unit_and_help(metrics: Metrics) -> None:
    metrics.serving(model="m", device="cpu", dtype="float32", load=FakeLoad, tables=FakeTables)
    ours = [f for f in metrics.registry.collect() if not f.name.startswith("process_")]
    assert len(ours) > 15
    for family in ours:
        assert family.name.startswith("a2sf_")
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        if family.type == "counter":
            assert any(s.name == f"{family.name}_total" for s in family.samples)


def test_buckets_go_from_milliseconds_to_minutes(metrics: Metrics) -> None:
    families = {f.name: f for f in metrics.registry.collect() if f.type == "histogram"}
    for name, longest in (
        ("a2sf_request_duration_seconds", 600),
        ("a2sf_time_to_first_token_seconds", 60),
        ("a2sf_queue_seconds", 60),
        ("a2sf_inter_token_seconds", 1),
    ):
        bounds = {float(s.labels["le"]) for s in families[name].samples if "le" in s.labels}
        assert min(bounds) <= 0.005
        assert max(b for b in bounds if math.isfinite(b)) >= longest


def test_two_servers_in_one_process_have_separate_metrics() -> None:
    one, two = Metrics(METHODS), Metrics(METHODS)
    one.answered("GetModel", "OK", 0.0)
    assert value(one, "a2sf_requests_total", method="GetModel", code="OK") == 1
    assert value(two, "a2sf_requests_total", method="GetModel", code="OK") == 0


def test_metrics_over_http_are_prometheus_text(served: MetricsServer) -> None:
    names = {family.name for family in text_string_to_metric_families(scrape(served))}
    assert {"a2sf_requests", "process_cpu_seconds"} <= names


def test_a_closed_metrics_server_frees_its_port(metrics: Metrics) -> None:
    server = serve_metrics(metrics, "127.0.0.1", 0)
    port = server.port
    server.close()
    again = serve_metrics(metrics, "127.0.0.1", port)
    again.close()


def test_a_metrics_port_in_use_is_refused_by_its_flag(metrics: Metrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"--metrics-port: .*127.0.0.1, port {port}"):
            serve_metrics(metrics, "127.0.0.1", port)


@pytest.mark.slow
def test_an_event_costs_less_than_five_microseconds() -> None:
    rounds = 20_000
    watch = Metrics(METHODS).completion()
    event: Event = delta()

    def once() -> float:
        begin = time.perf_counter()
        for _ in range(rounds):
            watch.event(event)
        return (time.perf_counter() - begin) / rounds

    assert min(once() for _ in range(5)) < 5e-6
