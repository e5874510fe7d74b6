"""OpenTelemetry traces of calls.

Owns the spans and their attributes: one server span per call, which is a child of the caller's span
if the call has a `traceparent`, and child spans for the engine's work: queue, prefill, decode. Only
an enabled tracer imports OpenTelemetry, so the service runs without it. Texts of prompts and
completions never enter a trace. Knows nothing of handlers.

We create the server span ourselves, because the interceptor of opentelemetry-instrumentation-grpc
0.66b2 does not work with grpc.aio 1.85: it iterates over every streaming handler, so a handler that
uses `context.write` fails with a TypeError; it records each `context.abort` as an exception; and a
call that ends by cancellation or deadline keeps the status OK.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import grpc
from structlog.contextvars import bound_contextvars

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.requests import Delta, Event, Finished, GenerationRequest, Started

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

Metadata = Sequence[tuple[str, str | bytes]]
"""Metadata of a call: key-value pairs; a key may occur several times."""

SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes that mark a server span as failed, by the semantic conventions for gRPC."""

ACCEPTED = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
}
"""Standard variables that select an exporter, with the only value that we support."""


class CallSpan:
    """The span of one call. This base class records nothing."""

    def request(self, request: GenerationRequest, model: str) -> None:
        """Record a request. Call it right before submission: the queue span starts here."""

    def event(self, event: Event) -> None:
        """Record an event of the stream when it is delivered."""

    def status(self, code: str) -> None:
        """Record the call's status: the name of the gRPC status code, such as `CANCELLED`."""


class Tracer:
    """Creates the spans of calls. This base class creates none."""

    def call(
        self, service: str, method: str, metadata: Metadata
    ) -> AbstractContextManager[CallSpan]:
        """Return a context manager that holds the span of one call.

        `service` is the full name, such as `a2sf.inference.v1.InferenceService`.
        """
        return _NOTHING

    def shutdown(self, timeout_s: float) -> None:
        """Send pending spans; block for at most `timeout_s` seconds."""


_NOTHING = nullcontext(CallSpan())


def start(enabled: bool) -> Tracer:
    """Return a tracer that exports OTLP over gRPC, set up by OTEL_* variables, or a disabled one.

    Raises InvalidArgument if OpenTelemetry is not installed or another exporter is selected.
    """
    if not enabled:
        return Tracer()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidArgument(
            "--traces",
            f"needs OpenTelemetry, and {error.name} is not installed; install a2sf-serve[otel], or "
            "leave --traces out",
        ) from error
    for variable, accepted in ACCEPTED.items():
        given = os.environ.get(variable) or accepted
        if given != accepted:
            raise InvalidArgument("--traces", f"{variable} is {given!r}; accepted: {accepted!r}")
    ours = Resource.create({"service.name": "a2sf-serve", "service.version": __version__})
    # Merge the environment last, so that it overrides our values.
    provider = TracerProvider(
        resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return RecordingTracer(provider)


class RecordingTracer(Tracer):
    """Creates spans with a provider, which it owns."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("a2sf.service", __version__)

    @contextmanager
    def call(self, service: str, method: str, metadata: Metadata) -> Iterator[CallSpan]:
        """See Tracer. Lines logged within the block carry the `trace_id`."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, format_trace_id, use_span

        span = self._tracer.start_span(
            f"{service}/{method}",
            context=extract(_carrier(metadata)),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        trace_id = format_trace_id(span.get_span_context().trace_id)
        with (
            # Aborts and cancellations are exceptions too; `status` records what they mean.
            use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False),
            bound_contextvars(trace_id=trace_id),
        ):
            yield _RecordingSpan(self._tracer, span) if span.is_recording() else CallSpan()

    def shutdown(self, timeout_s: float) -> None:
        """See Tracer."""
        # The provider's shutdown takes no timeout, and waits for an exporter that retries.
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(timeout_s)


class _RecordingSpan(CallSpan):
    """A recording span. It is the current span within its `with` block."""

    def __init__(self, tracer: Any, span: "Span") -> None:
        self._tracer = tracer
        self._span = span
        self._submitted_ns: int | None = None
        self._first_token = False

    def request(self, request: GenerationRequest, model: str) -> None:
        self._submitted_ns = time.time_ns()
        sampling = request.sampling
        self._span.set_attributes(
            {
                "a2sf.request_id": request.request_id,
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "a2sf",
                "gen_ai.request.model": model,
                "gen_ai.request.max_tokens": request.max_new_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
            }
        )

    def event(self, event: Event) -> None:
        if type(event) is Delta:
            if not self._first_token and event.token_ids:
                self._first_token = True
                self._span.add_event("first token")
        elif type(event) is Started:
            self._started(event)
        elif type(event) is Finished:
            self._finished(event)

    def status(self, code: str) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
        if code in SERVER_FAULTS:
            self._span.set_status(StatusCode.ERROR, code)

    def _started(self, event: Started) -> None:
        self._span.add_event("started")
        self._span.set_attributes(
            {
                "gen_ai.request.seed": event.seed,
                "gen_ai.usage.input_tokens": event.prompt_tokens,
                "a2sf.cache.method": event.policy.method,
                "a2sf.cache.budget": event.policy.budget,
            }
        )
        if event.policy.table_name is not None:
            self._span.set_attribute("a2sf.cache.table", event.policy.table_name)

    def _finished(self, event: Finished) -> None:
        assert self._submitted_ns is not None, "what is finished was submitted"
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": event.usage.prompt_tokens,
                "gen_ai.usage.output_tokens": event.usage.completion_tokens,
                "gen_ai.response.finish_reasons": (event.reason.value,),
                "a2sf.cache.evicted_tokens": event.cache.evicted_tokens,
                "a2sf.cache.kv_bytes": event.cache.kv_bytes,
                "a2sf.cache.kv_bytes_full": event.cache.kv_bytes_full,
            }
        )
        timings = event.timings
        begin_ns = self._submitted_ns
        for name, seconds in (
            ("queue", timings.queue_s),
            ("prefill", timings.prefill_s),
            ("decode", timings.decode_s),
        ):
            end_ns = begin_ns + round(seconds * 1e9)
            # No span for a phase that the request did not reach: its time is 0.
            if seconds > 0.0:
                self._tracer.start_span(name, start_time=begin_ns).end(end_ns)
            begin_ns = end_ns


def _carrier(metadata: Metadata) -> Mapping[str, list[str | bytes]]:
    """Convert metadata to the form that propagators read."""
    carrier: dict[str, list[str | bytes]] = {}
    for key, value in metadata:
        carrier.setdefault(key, []).append(value)
    return carrier
