"""A call is one server span below its caller's span, with child spans for the engine's work."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.trace import SpanKind, StatusCode
from structlog.contextvars import get_contextvars

from a2sf.policy import EffectivePolicy
from a2sf.requests import (
    CacheStatistics,
    Delta,
    Finished,
    FinishReason,
    GenerationRequest,
    Started,
    Timings,
    Usage,
)
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.telemetry import tracing
from service.telemetry.tracing import RecordingTracer

SERVICE = "a2sf.inference.v1.InferenceService"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
METADATA = (
    ("user-agent", "grpc-python"),
    ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),
    ("tracestate", "one=1"),
    ("tracestate", "two=2"),
    ("grpc-trace-bin", b"\x00"),
)
TEXT = "a secret stop"

REQUEST = GenerationRequest(request_id="mine", prompt_ids=(1, 2, 3), max_new_tokens=8, stop=(TEXT,))
STARTED = Started(
    request_id="mine",
    policy=EffectivePolicy(
        method="table",
        alpha=((0.5,),),
        budget=8,
        head_budgets=((8,),),
        recent=2,
        head_recents=((2,),),
        sinks=4,
        prefill_chunk=0,
        table_name="mathqa",
        table_sha256="00",
    ),
    prompt_tokens=3,
    seed=11,
)
DELTA = Delta(request_id="mine", text=TEXT, token_ids=(5,))


def finished(queue_s: float = 0.25, prefill_s: float = 0.5, decode_s: float = 1.0) -> Finished:
    return Finished(
        request_id="mine",
        reason=FinishReason.STOP,
        matched_stop=TEXT,
        usage=Usage(prompt_tokens=3, completion_tokens=2),
        cache=CacheStatistics(
            budget=8, kept_tokens=5, evicted_tokens=4, kv_bytes=64, kv_bytes_full=128
        ),
        timings=Timings(queue_s=queue_s, prefill_s=prefill_s, decode_s=decode_s),
    )


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[RecordingTracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield RecordingTracer(provider)
    provider.shutdown()


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def complete(tracer: tracing.Tracer, last: Finished) -> None:
    with tracer.call(SERVICE, "StreamGenerate", METADATA) as span:
        span.request(REQUEST, "org/model")
        for event in (STARTED, DELTA, DELTA, last):
            span.event(event)
        span.status("OK")


def test_a_call_is_a_server_span_and_a_child_of_the_callers_span(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    complete(tracer, finished())
    span = spans(exporter)[f"{SERVICE}/StreamGenerate"]
    assert span.kind is SpanKind.SERVER
    assert span.context is not None
    assert format(span.context.trace_id, "032x") == TRACE_ID
    assert span.parent is not None
    assert format(span.parent.span_id, "016x") == PARENT_ID
    assert span.parent.is_remote
    assert dict(span.context.trace_state) == {"one": "1", "two": "2"}


def test_a_call_without_a_traceparent_starts_a_trace(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    for _ in range(2):
        with tracer.call(SERVICE, "Tokenize", ()):
            pass
    one, two = exporter.get_finished_spans()
    assert one.parent is None
    assert one.context is not None
    assert two.context is not None
    assert one.context.trace_id != two.context.trace_id


def test_a_span_has_the_attributes_of_the_semantic_conventions(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    complete(tracer, finished())
    span = spans(exporter)[f"{SERVICE}/StreamGenerate"]
    assert dict(span.attributes or {}) == {
        rpc_attributes.RPC_SYSTEM: "grpc",
        rpc_attributes.RPC_SERVICE: SERVICE,
        rpc_attributes.RPC_METHOD: "StreamGenerate",
        rpc_attributes.RPC_GRPC_STATUS_CODE: 0,
        gen_ai_attributes.GEN_AI_OPERATION_NAME: "text_completion",
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: "a2sf",
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: "org/model",
        gen_ai_attributes.GEN_AI_REQUEST_MAX_TOKENS: 8,
        gen_ai_attributes.GEN_AI_REQUEST_TEMPERATURE: 1.0,
        gen_ai_attributes.GEN_AI_REQUEST_TOP_P: 1.0,
        gen_ai_attributes.GEN_AI_REQUEST_TOP_K: 0,
        gen_ai_attributes.GEN_AI_REQUEST_SEED: 11,
        gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS: 3,
        gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS: 2,
        gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS: ("stop",),
        "a2sf.request_id": "mine",
        "a2sf.cache.method": "table",
        "a2sf.cache.table": "mathqa",
        "a2sf.cache.budget": 8,
        "a2sf.cache.evicted_tokens": 4,
        "a2sf.cache.kv_bytes": 64,
        "a2sf.cache.kv_bytes_full": 128,
    }
    assert [event.name for event in span.events] == ["started", "first token"]


def test_traces_contain_no_text(tracer: RecordingTracer, exporter: InMemorySpanExporter) -> None:
    complete(tracer, finished())
    assert exporter.get_finished_spans()
    assert not any(TEXT in span.to_json() for span in exporter.get_finished_spans())


def test_queue_prefill_and_decode_are_consecutive_child_spans(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    before = time.time_ns()
    complete(tracer, finished())
    after = time.time_ns()
    found = spans(exporter)
    server = found[f"{SERVICE}/StreamGenerate"]
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    end = None
    for part, seconds in zip(parts, (0.25, 0.5, 1.0), strict=True):
        assert part.parent is not None
        assert server.context is not None
        assert part.parent.span_id == server.context.span_id
        assert part.start_time is not None
        assert part.end_time is not None
        assert part.end_time - part.start_time == seconds * 1e9
        assert end is None or part.start_time == end
        end = part.end_time
    assert parts[0].start_time is not None
    assert before <= parts[0].start_time <= after


def test_phases_that_a_request_did_not_reach_have_no_span(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    complete(tracer, finished(prefill_s=0.0, decode_s=0.0))
    assert set(spans(exporter)) == {f"{SERVICE}/StreamGenerate", "queue"}


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        (grpc.StatusCode.OK, False),
        (grpc.StatusCode.CANCELLED, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True),
        (grpc.StatusCode.INTERNAL, True),
    ],
)
def test_only_server_failures_mark_a_span_as_failed(
    tracer: RecordingTracer, exporter: InMemorySpanExporter, code: grpc.StatusCode, failed: bool
) -> None:
    with tracer.call(SERVICE, "Generate", METADATA) as span:
        span.status(code.name)
    (found,) = exporter.get_finished_spans()
    assert (found.status.status_code is StatusCode.ERROR) is failed
    assert (found.attributes or {})["rpc.grpc.status_code"] == code.value[0]


@pytest.mark.parametrize("cause", [asyncio.CancelledError, RuntimeError])
def test_an_interrupted_call_ends_its_span(
    tracer: RecordingTracer, exporter: InMemorySpanExporter, cause: type[BaseException]
) -> None:
    def cut_off() -> None:
        with tracer.call(SERVICE, "Generate", METADATA) as span:
            span.request(REQUEST, "org/model")
            span.event(STARTED)
            raise cause(TEXT)

    with pytest.raises(cause):
        cut_off()
    (found,) = exporter.get_finished_spans()
    assert found.end_time is not None
    assert [event.name for event in found.events] == ["started"]
    assert TEXT not in found.to_json()


async def test_concurrent_calls_have_separate_spans(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    async def call() -> str:
        with tracer.call(SERVICE, "Generate", ()) as span:
            await asyncio.sleep(0)
            span.request(REQUEST, "org/model")
            span.event(finished())
            return str(get_contextvars()["trace_id"])

    logged = set(await asyncio.gather(*(call() for _ in range(3))))
    assert len(logged) == 3
    assert "trace_id" not in get_contextvars()
    found = exporter.get_finished_spans()
    assert len(found) == 12
    assert {format(s.context.trace_id, "032x") for s in found if s.context} == logged


async def test_a_grpc_call_continues_the_callers_trace_for_every_outcome(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    arrived = asyncio.Event()

    class Servicer(pb_grpc.InferenceServiceServicer):
        # As the service's own handlers are written: with `write`, `abort`, and in one piece.
        async def StreamGenerate(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
            with tracer.call(SERVICE, "StreamGenerate", context.invocation_metadata()) as span:
                await context.write(pb.StreamGenerateResponse())
                span.status("OK")

        async def Tokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
            with tracer.call(SERVICE, "Tokenize", context.invocation_metadata()) as span:
                span.status("RESOURCE_EXHAUSTED")
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

        async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
            with tracer.call(SERVICE, "Generate", context.invocation_metadata()) as span:
                arrived.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    span.status("CANCELLED")
                    raise

    server = grpc.aio.server()
    pb_grpc.add_InferenceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = pb_grpc.InferenceServiceStub(channel)
        stream = stub.StreamGenerate(pb.StreamGenerateRequest(), metadata=METADATA)
        assert len([message async for message in stream]) == 1
        with pytest.raises(grpc.aio.AioRpcError, match="full"):
            await stub.Tokenize(pb.TokenizeRequest(), metadata=METADATA)
        call = stub.Generate(pb.GenerateRequest(), metadata=METADATA)
        await arrived.wait()
        call.cancel()
    await server.stop(None)
    async with asyncio.timeout(10):
        while len(exporter.get_finished_spans()) < 3:
            await asyncio.sleep(0.01)
    codes = {}
    for span in exporter.get_finished_spans():
        assert span.parent is not None
        assert format(span.parent.span_id, "016x") == PARENT_ID
        assert not span.events
        codes[span.name.partition("/")[2]] = (span.attributes or {})["rpc.grpc.status_code"]
    assert codes == {"StreamGenerate": 0, "Tokenize": 8, "Generate": 1}


def test_a_call_that_the_caller_does_not_sample_records_nothing(
    tracer: RecordingTracer, exporter: InMemorySpanExporter
) -> None:
    metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00"),)
    with tracer.call(SERVICE, "Generate", metadata) as span:
        assert type(span) is tracing.CallSpan
        span.request(REQUEST, "org/model")
        span.event(finished())
        span.status("OK")
    assert not exporter.get_finished_spans()
