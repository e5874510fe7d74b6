"""Clients may ping once a second, whether or not the server sends data."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from tests.service.conftest import ENDLESS, WAIT_S, StartServer, until
from tests.service.wire import PREFACE, until_hung_up_on

LASTS_S = 5.0
"""By default, pings of each second end a connection in three."""

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"are you?"

TIME_LIMIT = pb.FINISH_REASON_TIME_LIMIT


@asynccontextmanager
async def pinging(address: str, every_ms: int) -> AsyncIterator[Any]:
    """A stub whose channel pings that often, all the time."""
    options = [
        ("grpc.keepalive_time_ms", every_ms),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield pb_grpc.InferenceServiceStub(channel)


def request(**fields: Any) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        input=pb.GenerationInput(**{"text": "x", **ENDLESS, "time_limit_seconds": LASTS_S} | fields)
    )


async def last(call: Any) -> Any:
    message = None
    async for message in call:  # noqa: B007
        pass
    return message


async def test_a_ping_per_second_is_allowed_while_a_request_waits(
    start_server: StartServer,
) -> None:
    """Nothing is sent to it meanwhile, so that nothing excuses the pings."""
    server, _, address = await start_server(max_batch=1)
    async with pinging(address, 600_000) as other, pinging(address, 1000) as stub:
        running = other.StreamGenerate(request(time_limit_seconds=WAIT_S), timeout=WAIT_S)
        await until(lambda: server.core.engine.running == 1)
        finished = (await last(stub.StreamGenerate(request(), timeout=WAIT_S))).finished
        assert finished.reason == TIME_LIMIT
        assert finished.usage.completion_tokens == 0
        running.cancel()


async def test_pings_are_allowed_while_tokens_flow(start_server: StartServer) -> None:
    """What is sent to a client excuses its pings."""
    _, _, address = await start_server()
    async with pinging(address, 1000) as stub:
        finished = (await last(stub.StreamGenerate(request(), timeout=WAIT_S))).finished
    assert finished.reason == TIME_LIMIT
    assert finished.usage.completion_tokens > LASTS_S


async def test_a_flood_of_pings_closes_only_its_connection(start_server: StartServer) -> None:
    server, _, address = await start_server(max_batch=1)
    async with pinging(address, 1000) as other:
        running = other.StreamGenerate(request(time_limit_seconds=WAIT_S), timeout=WAIT_S)
        await until(lambda: server.core.engine.running == 1)
        # gRPC's own clients ping once a second at most.
        await until_hung_up_on(address, PREFACE + SETTINGS + PING * 4)
        assert server.core.engine.running == 1
        assert await running.read()
        running.cancel()
