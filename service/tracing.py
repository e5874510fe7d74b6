"""Traces of calls, for OpenTelemetry; nothing at all where they are off.

Owns the spans and their attributes: one server span a call, a child of the caller's where its
`traceparent` says so, and below it what the engine did with the request: queue, prefill, decode.
OpenTelemetry is imported only by a tracer that is on, so that the service runs without it. Texts of
prompts and completions never enter a trace. Knows nothing of handlers.

The server span is our own work, because the interceptor of opentelemetry-instrumentation-grpc
0.66b2 does not fit grpc.aio 1.85: it iterates over every streaming handler, so that one written
with `context.write` fails with a TypeError; it records each `context.abort` as an exception; and a
call that ends by cancellation or deadline stays OK.
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
"""A call's metadata: pairs, of which a key may have several."""

SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes with which a server's span counts as failed, by the semantic conventions of gRPC."""

ACCEPTED = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
}
"""Standard variables that choose among exporters, and the one choice that there is here."""


class CallSpan:
    """One call's span; this one goes nowhere."""

    def request(self, request: GenerationRequest, model: str) -> None:
        """Tell what is asked for. Comes right before it is submitted: the queue begins here."""

    def event(self, event: Event) -> None:
        """Tell an event of the stream as it is delivered."""

    def status(self, code: str) -> None:
        """Tell how the call ends: the gRPC status code's name, such as `CANCELLED`."""


class Tracer:
    """Makes the spans of calls; this one makes none."""

    def call(
        self, service: str, method: str, metadata: Metadata
    ) -> AbstractContextManager[CallSpan]:
        """Return a span for the length of a `with` block, which is one call's.

        `service` is the full name, such as `a2sf.inference.v1.InferenceService`.
        """
        return _NOTHING

    def shutdown(self, timeout_s: float) -> None:
        """Send what has not been sent; give up after `timeout_s` seconds. Blocks meanwhile."""


_NOTHING = nullcontext(CallSpan())


def start(enabled: bool) -> Tracer:
    """Return a tracer that sends by OTLP over gRPC as the OTEL_* environment says, or one of none.

    Raises InvalidArgument where traces are wanted without OpenTelemetry, or by another exporter.
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
            f"need OpenTelemetry, of which {error.name} is not installed; install "
            "a2sf-serve[otel], or do without traces",
        ) from error
    for variable, accepted in ACCEPTED.items():
        told = os.environ.get(variable) or accepted
        if told != accepted:
            raise InvalidArgument("--traces", f"{variable} is {told!r}; accepted: {accepted!r}")
    ours = Resource.create({"service.name": "a2sf-serve", "service.version": __version__})
    # Merged again, because what the environment says goes before what we say.
    provider = TracerProvider(
        resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return RecordingTracer(provider)


class RecordingTracer(Tracer):
    """Makes spans with a provider, which it owns."""

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
            # An abort and a cancellation are exceptions too; what they mean is told by `status`.
            use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False),
            bound_contextvars(trace_id=trace_id),
        ):
            yield _RecordingSpan(self._tracer, span) if span.is_recording() else CallSpan()

    def shutdown(self, timeout_s: float) -> None:
        """See Tracer."""
        # The provider takes no limit, and waits for an exporter that retries.
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(timeout_s)


class _RecordingSpan(CallSpan):
    """The span that is current, within its `with` block."""

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
            # What the request did not live to see took no time.
            if seconds > 0.0:
                self._tracer.start_span(name, start_time=begin_ns).end(end_ns)
            begin_ns = end_ns


def _carrier(metadata: Metadata) -> Mapping[str, list[str | bytes]]:
    """Put metadata into the form that propagators read."""
    carrier: dict[str, list[str | bytes]] = {}
    for key, value in metadata:
        carrier.setdefault(key, []).append(value)
    return carrier
