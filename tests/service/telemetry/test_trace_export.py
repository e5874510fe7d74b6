"""How the tracer starts and ends: which exporter it uses, and what it does when it is off."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from a2sf.errors import InvalidArgument
from service.telemetry import tracing
from tests.service.telemetry.test_tracing import SERVICE, complete, finished


def test_a_disabled_tracer_imports_nothing() -> None:
    complete(tracing.start(False), finished())
    tracing.start(False).shutdown(1.0)
    script = (
        "import sys; from service.telemetry import tracing; t = tracing.start(False)\n"
        "with t.call('s', 'm', ()) as span: span.status('OK')\n"
        "t.shutdown(1.0)\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_missing_opentelemetry_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(InvalidArgument, match=r"--traces: .*a2sf-serve\[otel\]"):
        tracing.start(True)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_other_exporters_are_refused_by_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgument, match=f"{variable} is '{value}'"):
        tracing.start(True)


Collector = Callable[[Callable[[], None]], list[Any]]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that the environment points to; it calls a function, then takes the spans."""
    servers: list[grpc.Server] = []

    def start(meanwhile: Callable[[], None]) -> list[Any]:
        taken: list[Any] = []

        class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
                meanwhile()
                taken.extend(request.resource_spans)
                return trace_service_pb2.ExportTraceServiceResponse()

        server = grpc.server(futures.ThreadPoolExecutor(1))
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        return taken

    yield start
    for server in servers:
        server.stop(None).wait(10)


def test_shutdown_exports_pending_spans_to_the_configured_endpoint(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = collector(lambda: None)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    tracer = tracing.start(True)
    complete(tracer, finished())
    tracer.shutdown(30.0)
    (resource_spans,) = taken
    resource = {a.key: a.value.string_value for a in resource_spans.resource.attributes}
    assert resource["service.name"] == "theirs"
    assert resource["service.version"]
    names = [span.name for scope in resource_spans.scope_spans for span in scope.spans]
    assert sorted(names) == [f"{SERVICE}/StreamGenerate", "decode", "prefill", "queue"]


def test_shutdown_does_not_wait_for_a_hanging_collector(collector: Collector) -> None:
    hold = threading.Event()
    collector(lambda: (hold.wait(30), None)[1])
    tracer = tracing.start(True)
    complete(tracer, finished())
    begin = time.monotonic()
    tracer.shutdown(0.3)
    assert time.monotonic() - begin < 15.0, "the collector hangs for 30 s"
    hold.set()
    for thread in threading.enumerate():
        if thread.name == "traces":
            thread.join(30)
