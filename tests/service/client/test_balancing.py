"""Several servers behind one client, in this process; `test_several` has them as processes."""

import asyncio
import threading
from contextlib import aclosing
from typing import Any

import grpc

from service.backend.loading import Core, load_core
from service.client import Client
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.server import Server
from tests.service.client.test_channel import UP, Model, serving, with_health
from tests.service.conftest import ENDLESS, WAIT_S, StartServer


def calls_of(server: Server) -> float:
    """Calls that reached a server and were answered, be it with a refusal."""
    families = server._metrics.registry.collect()
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "a2sf_requests_total"
    )


async def test_many_calls_that_fail_at_once_are_all_retried() -> None:
    broken = asyncio.Event()

    class Breaking(Model):
        async def GetModel(  # noqa: N802
            self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
        ) -> pb.GetModelResponse:
            if not broken.is_set():
                self.metadata.append({})
                await broken.wait()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as of a process that died")
            return await super().GetModel(request, context)

    one, other = Breaking("one"), Model("other")
    async with (
        serving(one, None, await with_health(UP)) as a,
        serving(other, None, await with_health(UP)) as b,
        Client(f"127.0.0.1:{a},127.0.0.1:{b}") as client,
        asyncio.timeout(WAIT_S),
    ):
        calls = []
        while len(one.metadata) < 200:
            calls.append(asyncio.create_task(client.get_model(timeout_s=WAIT_S)))
            await asyncio.sleep(0.001)
        broken.set()
        answers = await asyncio.gather(*calls)
    assert {answer.server_version for answer in answers} == {"one", "other"}


async def test_a_server_gets_no_calls_until_it_is_warm(start_server: StartServer) -> None:
    warm = threading.Event()

    def load(options: ServerOptions) -> Core:
        assert warm.wait(WAIT_S)
        return load_core(options)

    first, _, address = await start_server()
    second = Server(first._options.model_copy(update={"port": 0}), load)
    port = await second.bind()
    warming = asyncio.create_task(second.warm())
    try:
        async with (
            Client(f"{address},127.0.0.1:{port}") as client,
            asyncio.timeout(WAIT_S),
            aclosing(client.stream_generate("x", **ENDLESS)) as events,
        ):
            await anext(events)
            for _ in range(10):
                await client.get_model()
            assert calls_of(second) == 0
            warm.set()
            while not calls_of(second):
                await client.get_model()
    finally:
        warm.set()
        await warming
        await second.stop()
