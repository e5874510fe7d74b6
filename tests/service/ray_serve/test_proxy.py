"""The services in Ray's gRPC proxy: its real server, with made-up replicas."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import grpc
import pytest

from a2sf.errors import A2SFError, Aborted, InvalidRequest, NotFound, ResourceExhausted, Unavailable
from service.client import Client
from service.client.calls import Call
from service.client.channel import PLAIN_TEXT, open_aio
from service.client.transport import AsyncTransport
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.ray_serve import proxy
from service.status import NoRoom, RemoteError, from_wire, to_wire
from tests.service.conftest import WAIT_S, until

ray_server = pytest.importorskip("ray.serve._private.grpc_util").gRPCGenericServer

Made = Callable[[grpc.aio.ServicerContext[Any, Any]], AsyncIterator[Any]]
DELTA = pb.StreamGenerateResponse(delta=pb.GenerationDelta(text="x"))
UNREAD = [pb.StreamGenerateResponse(delta=pb.GenerationDelta(text="x" * 100_000))] * 200
"""More than a connection holds for a client that does not read: the next write gets stuck."""


def fail(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    """Do as Ray does with the context of a replica's answer."""
    status = to_wire(error, "r-1")
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata(status.trailers)


def die(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Do as Ray does where a replica has died with a request."""
    context.set_code(grpc.StatusCode.INTERNAL)
    context.set_details("The actor died unexpectedly before finishing this task. Traceback: ...")


@asynccontextmanager
async def serving(made: Made) -> AsyncIterator[str]:
    """Run Ray's server with our services, each call of which yields what `made` does."""

    def factory(service_method: str, streaming_type: str) -> Callable[..., Any]:
        async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            async for message in made(context):
                yield message.SerializeToString()

        async def unary(request: Any, context: Any) -> bytes:
            return b"".join([part async for part in stream(request, context)])

        return unary if streaming_type == "unary_unary" else stream

    server = ray_server(factory)
    proxy.add_services(Mock(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def generate(address: str) -> Any:
    """Call once."""
    async with open_aio(address, PLAIN_TEXT, balanced=False) as channel:
        return await pb_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest())


async def stream(address: str) -> Any:
    """The same, of a stream."""
    async with open_aio(address, PLAIN_TEXT, balanced=False) as channel:
        call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(pb.StreamGenerateRequest())
        return [message async for message in call]


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def generate_by_client(transport: AsyncTransport) -> Any:
    stub = pb_grpc.InferenceServiceStub
    call = Call(stub, "Generate", pb.GenerateRequest(), lambda message: message)
    return await transport.unary(call, WAIT_S)


async def stream_by_client(transport: AsyncTransport) -> Any:
    stub = pb_grpc.InferenceServiceStub
    call = Call(stub, "StreamGenerate", pb.StreamGenerateRequest(), lambda message: message)
    return [message async for message in transport.stream(call, WAIT_S)]


@pytest.mark.parametrize(
    ("ask", "answer"),
    [(generate_by_client, pb.GenerateResponse(text="x")), (stream_by_client, [DELTA])],
)
async def test_a_request_lost_with_its_replica_is_retried_by_the_client(
    ask: Callable[[AsyncTransport], Awaitable[Any]], answer: Any
) -> None:
    tries = 0

    async def made(context: Any) -> AsyncIterator[Any]:
        nonlocal tries
        tries += 1
        if tries < 3:
            die(context)
        else:
            yield answer if ask is generate_by_client else DELTA

    async with serving(made) as address, AsyncTransport(address) as transport:
        assert await ask(transport) == answer
    assert tries == 3


async def test_a_started_stream_ends_as_unavailable_and_is_not_retried() -> None:
    tries = 0

    async def made(context: Any) -> AsyncIterator[Any]:
        nonlocal tries
        tries += 1
        yield DELTA
        die(context)

    async with serving(made) as address:
        with pytest.raises(grpc.RpcError) as caught:
            await stream(address)
    assert tries == 1
    error = from_wire(caught.value)
    assert isinstance(error, Unavailable)
    assert "actor" not in str(error), "Ray's words stay with Ray"


@pytest.mark.parametrize("ask", [generate, stream])
async def test_a_replicas_failure_keeps_its_details_and_delivers_no_message(
    ask: Callable[[str], Awaitable[Any]],
) -> None:
    violations = (("input.stop", "too many"), ("input.seed", "too large"))

    async def made(context: Any) -> AsyncIterator[Any]:
        fail(context, InvalidRequest(violations))
        yield pb.StreamGenerateResponse()

    async with serving(made) as address:
        with pytest.raises(grpc.RpcError) as caught:
            await ask(address)
    error = from_wire(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.violations == violations


@pytest.mark.parametrize(
    "method",
    [
        "/a2sf.inference.v1.InferenceService/Generate",
        "/a2sf.inference.v1.InferenceService/StreamGenerate",
        "/a2sf.inference.v1.ModelService/GetAlphaTable",
        "/grpc.health.v1.Health/Check",
    ],
)
async def test_the_proxy_refuses_an_undecodable_request(method: str) -> None:
    async def made(_: Any) -> AsyncIterator[Any]:
        raise AssertionError("no replica is asked")
        yield DELTA

    async with serving(made) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await channel.unary_unary(method)(b"\x0a\x05cut", timeout=WAIT_S)
    error = from_wire(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == "request"


async def test_events_before_a_failure_are_delivered() -> None:
    async def made(context: Any) -> AsyncIterator[Any]:
        yield DELTA
        yield DELTA
        fail(context, Aborted("ended"))
        yield pb.StreamGenerateResponse()

    async with serving(made) as address, grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(pb.StreamGenerateRequest())
        assert [await call.read(), await call.read()] == [DELTA, DELTA]
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
    assert isinstance(from_wire(caught.value), Aborted)


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
        (grpc.StatusCode.NOT_FOUND, Unavailable),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.PERMISSION_DENIED, RemoteError),
    ],
)
async def test_rays_own_failures_become_errors_of_the_service(
    code: grpc.StatusCode, meant: type[A2SFError]
) -> None:
    async def made(context: Any) -> AsyncIterator[Any]:
        context.set_code(code)
        context.set_details("said by Ray")
        for nothing in ():
            yield nothing

    async with serving(made) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await pb_grpc.ModelServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=WAIT_S)
    error = from_wire(caught.value)
    assert type(error) is (NoRoom if meant is ResourceExhausted else meant)
    assert "said by Ray" in str(error)


async def test_not_found_from_a_replica_is_unchanged() -> None:
    async def made(context: Any) -> AsyncIterator[Any]:
        fail(context, NotFound("no table"))
        yield pb.GetModelResponse()

    async with serving(made) as address, Client(address) as client:
        with pytest.raises(NotFound, match="no table"):
            await client.get_model()


async def test_the_replica_notices_a_client_that_leaves_with_unread_messages() -> None:
    went_on, left = asyncio.Event(), asyncio.Event()

    async def made(context: Any) -> AsyncIterator[Any]:
        try:
            for message in UNREAD:
                yield message
            went_on.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.set()
            raise

    async with serving(made) as address, asyncio.timeout(WAIT_S):
        async with grpc.aio.insecure_channel(address) as channel:
            call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(pb.StreamGenerateRequest())
            await call.read()
            await went_on.wait()
        await left.wait()


async def test_a_client_that_does_not_read_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "STALL_TIMEOUT_S", 0.2)
    ended = False

    async def made(context: Any) -> AsyncIterator[Any]:
        nonlocal ended
        try:
            for message in UNREAD:
                yield message
            await asyncio.Event().wait()
        finally:
            ended = True

    async with serving(made) as address, grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(pb.StreamGenerateRequest())
        await call.read()
        await until(lambda: ended)
        with pytest.raises(grpc.RpcError) as caught:
            await drain(call)
        error = from_wire(caught.value)
    assert isinstance(error, Aborted)
    assert "stopped reading" in str(error)
