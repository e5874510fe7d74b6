"""When a call that found no room, or no server, is repeated, and how often."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from a2sf.errors import ResourceExhausted, Unavailable
from service.client import AdminClient, Client, SyncAdminClient, SyncClient
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.status import NoRoom
from tests.service.client.test_channel import UP, Model, with_health
from tests.service.client.test_channel import serving as serving_model
from tests.service.client.test_transport import Collect, Context, both, fail, serving
from tests.service.conftest import WAIT_S


async def full(context: Context, _: int) -> None:
    await fail(context, ResourceExhausted("full"))


class Full(Model):
    """Has room for nothing, but counts what it refuses."""

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        self.metadata.append({})
        await full(context, 0)
        raise AssertionError


async def by_asyncio(target: str, describe: Callable[[Any], Awaitable[None]]) -> None:
    async with Client(target) as client:
        await describe(client.get_model)


async def by_threads(target: str, describe: Callable[[Any], Awaitable[None]]) -> None:
    with SyncClient(target) as client:
        await describe(lambda: asyncio.to_thread(client.get_model))


@pytest.mark.parametrize("by", [by_asyncio, by_threads])
async def test_a_full_server_of_two_causes_no_wait(by: Any) -> None:
    busy, free = Full("busy"), Model("free")

    async def describe(get_model: Callable[[], Awaitable[Any]]) -> None:
        while not (busy.metadata and free.metadata):
            await get_model()
        refused = len(busy.metadata)
        for _ in range(10):
            began = time.monotonic()
            assert (await get_model()).server_version == "free"
            # The busy one says half a second each time.
            assert time.monotonic() - began < 0.45
        assert len(busy.metadata) >= refused + 5

    async with (
        serving_model(busy, None, await with_health(UP)) as one,
        serving_model(free, None, await with_health(UP)) as other,
        asyncio.timeout(WAIT_S),
    ):
        await by(f"127.0.0.1:{one},127.0.0.1:{other}", describe)


@pytest.mark.parametrize("by", [by_asyncio, by_threads])
async def test_a_unary_call_also_fails_after_four_rounds(by: Any) -> None:
    busy = Full("busy")

    async def describe(get_model: Callable[[], Awaitable[Any]]) -> None:
        began = time.monotonic()
        with pytest.raises(NoRoom, match="full"):
            await get_model()
        assert 1.5 <= time.monotonic() - began < 5

    async with serving_model(busy) as port:
        await by(f"127.0.0.1:{port}", describe)
    assert len(busy.metadata) == 4


async def administer_by_asyncio(target: str, ask: Callable[[Any], Any]) -> None:
    async with AdminClient(target) as client:
        await ask(client)


async def administer_by_threads(target: str, ask: Callable[[Any], Any]) -> None:
    with SyncAdminClient(target) as client:
        await asyncio.to_thread(ask, client)


@pytest.mark.parametrize(
    ("ask", "attempts"),
    [
        (lambda admin: admin.get_load(), 4),
        (lambda admin: admin.reload_alpha_tables(), 1),
        (lambda admin: admin.activate_alpha_table("t", etag="e"), 1),
        (lambda admin: admin.abort_requests(["a"]), 1),
    ],
)
@pytest.mark.parametrize("by", [administer_by_asyncio, administer_by_threads])
async def test_an_admin_call_that_changes_the_server_is_not_repeated(
    ask: Callable[[Any], Any], attempts: int, by: Any
) -> None:
    made = 0

    async def lost(request: Any, context: Context) -> None:
        nonlocal made
        made += 1
        await fail(context, Unavailable("lost"))

    server = grpc.aio.server()
    names = ("GetLoad", "ReloadAlphaTables", "ActivateAlphaTable", "AbortRequests")
    admin = SimpleNamespace(**dict.fromkeys(names, lost))
    pb_grpc.add_AdminServiceServicer_to_server(admin, server)  # type: ignore[arg-type]
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        with pytest.raises(Unavailable, match="lost"):
            await by(target, ask)
    finally:
        await server.stop(0)
    assert made == attempts


@both
async def test_full_servers_are_reported_after_four_rounds(collect: Collect) -> None:
    async with serving(full) as (first, one), serving(full) as (second, other):
        began = time.monotonic()
        with pytest.raises(NoRoom, match="full"):
            await collect(f"{one},{other}", WAIT_S)
        assert 1.5 <= time.monotonic() - began < 5
    assert first.attempts + second.attempts == 8


@both
async def test_retries_do_not_wait_past_the_deadline(collect: Collect) -> None:
    async with serving(full) as (fake, to):
        with pytest.raises(NoRoom) as caught:
            await collect(to, 0.4)
    assert caught.value.retry_after_s == 0.5
    assert fake.attempts == 1
