"""The server in this process: health, reflection, draining, and a crash of the engine."""

import asyncio
import socket
import threading
import urllib.request
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from a2sf.engine.engine import Engine
from a2sf.errors import A2SFError, InvalidArgument, Unavailable
from a2sf.requests import Event, Finished
from service.backend.loading import Core, load_core
from service.client import Client
from service.config.options import ServerOptions
from service.rpc.startup import WATCHING
from service.server import INFERENCE_SERVICES, Server
from service.status import RemoteError
from tests.service.conftest import ENDLESS, WAIT_S, StartServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def check(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S)
        return int(answer.status)


async def test_health_says_not_serving_until_warm_and_calls_are_unavailable(
    long_model_dir: Path,
) -> None:
    loading, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def load(options: ServerOptions) -> Core:
        loop.call_soon_threadsafe(loading.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(WAIT_S)
        return load_core(options)

    options = ServerOptions(model=str(long_model_dir), port=0, device="cpu")
    server = Server(options, load)
    address = f"127.0.0.1:{await server.bind()}"
    warming = asyncio.create_task(server.warm())
    await asyncio.wait_for(loading.wait(), WAIT_S)
    async with Client(address) as client:
        assert {await check(address, name) for name in ("", *INFERENCE_SERVICES)} == {NOT_SERVING}
        with pytest.raises(Unavailable, match="starting"):
            await client.generate("x", max_new_tokens=1)
        with pytest.raises(Unavailable, match="starting"):
            await client.get_model()
        go_on.set()
        await asyncio.wait_for(warming, WAIT_S)
        assert {await check(address, name) for name in ("", *INFERENCE_SERVICES)} == {SERVING}
        await client.generate("x", max_new_tokens=1)
    await asyncio.wait_for(server.stop(), WAIT_S)


async def test_reflection_lists_the_services(start_server: StartServer) -> None:
    _, _, address = await start_server()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(timeout=WAIT_S)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {*INFERENCE_SERVICES, "grpc.health.v1.Health"}


async def test_the_model_is_described(start_server: StartServer) -> None:
    server, client, _ = await start_server()
    described = await client.get_model()
    core = server.core
    assert described.model.model_dump() == core.model.identity.model_dump()
    assert described.max_context == core.model.shape.max_context
    assert (described.slots, described.max_batch) == (64, 2)
    assert described.kv_slab_bytes == core.engine.kv_slab_bytes > 0
    assert described.default_cache_policy == core.config.default_policy
    assert (described.dtype, described.device) == ("float32", "cpu")


async def test_draining_refuses_new_calls_and_finishes_running_ones(
    start_server: StartServer,
) -> None:
    server, client, address = await start_server()
    stream = client.stream_generate("x", max_new_tokens=400, ignore_eos=True)
    async with asyncio.timeout(WAIT_S), aclosing(stream) as events:
        await anext(events)
        draining = asyncio.create_task(server.drain(WAIT_S))
        while await check(address) != NOT_SERVING:
            pass
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate("y", max_new_tokens=1)
        last = [event async for event in events][-1]
        assert isinstance(last, Finished)
        assert last.usage.completion_tokens == 400
        await draining


async def test_new_calls_are_accepted_while_the_server_settles(
    start_server: StartServer,
) -> None:
    server, client, address = await start_server()
    async with asyncio.timeout(WAIT_S):
        draining = asyncio.create_task(server.drain(WAIT_S, settle_s=2.0))
        while await check(address) != NOT_SERVING:
            pass
        answer = await client.generate("y", max_new_tokens=2, ignore_eos=True)
        assert answer.finished.usage.completion_tokens == 2
        assert not draining.done()
        await draining
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate("y", max_new_tokens=1)


async def test_the_metrics_give_model_load_and_limits(
    start_server: StartServer,
) -> None:
    server, client, _ = await start_server(metrics_port=0)
    url = server.metrics_url
    assert url is not None

    def scrape() -> str:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return str(answer.read().decode())

    async with asyncio.timeout(WAIT_S), aclosing(client.stream_generate("x", **ENDLESS)) as events:
        await anext(events)
        observed = await asyncio.to_thread(scrape)
    assert f'id="{server.core.model.identity.id}"' in observed
    assert "a2sf_requests_running 1.0" in observed
    assert "a2sf_requests_capacity 66.0" in observed
    assert f"a2sf_kv_limit_bytes {float(server.core.engine.kv_slab_bytes)}" in observed
    await server.stop()
    with pytest.raises(OSError):
        await asyncio.to_thread(scrape)


@pytest.mark.parametrize("watched", [True, False])
async def test_the_directory_of_tables_is_watched_by_default(
    watched: bool, start_server: StartServer, tmp_path: Path
) -> None:
    server, _, _ = await start_server(tables=tmp_path, watch_tables=watched)
    assert (WATCHING in {task.get_name() for task in asyncio.all_tasks()}) == watched
    if not watched:
        return
    (tmp_path / "broken.json").write_text("{")
    async with asyncio.timeout(WAIT_S):
        while "broken" not in server.core.tables.now.refused:
            await asyncio.sleep(0.01)


async def test_a_failed_watch_is_logged_once_and_does_not_block_shutdown(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("no watch")

    monkeypatch.setattr("service.rpc.startup.watch", fail)
    with capture_logs() as logs:
        server, client, _ = await start_server(tables=tmp_path)
        await client.generate("x", max_new_tokens=1)
        await server.stop()
    assert [line["event"] for line in logs].count("tables are no longer watched") == 1
    assert not server.thread_left_running
    assert "engine" not in {thread.name for thread in threading.enumerate()}


async def test_a_server_that_never_served_does_not_settle(long_model_dir: Path) -> None:
    server = Server(ServerOptions(model=str(long_model_dir), port=0, device="cpu"))
    await server.bind()
    await asyncio.wait_for(server.drain(WAIT_S, settle_s=1000.0), WAIT_S)
    await server.stop()


async def test_a_request_above_max_message_bytes_is_refused(start_server: StartServer) -> None:
    _, client, _ = await start_server(max_message_bytes=10_000)
    assert await client.tokenize("x" * 5_000)
    with pytest.raises(A2SFError, match="larger than max"):
        await client.tokenize("x" * 20_000)


async def test_an_admin_port_in_use_is_refused_by_its_flag(
    long_model_dir: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("admin-token-0123456789\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(
            ServerOptions(port=0, admin_port=taken.getsockname()[1], admin_token_file=tokens)
        )
        with pytest.raises(InvalidArgument, match=r"--admin-port: .*already in use"):
            await server.bind()
        await server.stop()


async def test_calls_that_exceed_the_grace_end_as_unavailable(
    start_server: StartServer,
) -> None:
    server, client, _ = await start_server()
    async with asyncio.timeout(WAIT_S), aclosing(client.stream_generate("x", **ENDLESS)) as events:
        await anext(events)
        await server.drain(0.1)
        stopping = asyncio.create_task(server.stop())
        with pytest.raises(Unavailable, match="shutting down"):
            async for _ in events:
                pass
        await stopping


async def test_an_open_health_watch_is_notified_and_does_not_delay_shutdown(
    start_server: StartServer,
) -> None:
    server, _, address = await start_server()
    async with asyncio.timeout(WAIT_S), grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        loop = asyncio.get_running_loop()
        draining = asyncio.create_task(server.drain(WAIT_S, settle_s=0.5))
        assert (await watch.read()).status == NOT_SERVING
        # A client whose watch ended would at once open another.
        after = asyncio.create_task(watch.read())
        await draining
        assert not after.done()
        started = loop.time()
        await server.stop()
        assert loop.time() - started < 1.5
        assert await after is grpc.aio.EOF


async def test_an_engine_crash_fails_calls_as_internal_and_is_reported(
    start_server: StartServer,
) -> None:
    broken = asyncio.Event()

    class FragileEngine(Engine):
        def step(self) -> list[Event]:
            if broken.is_set():
                raise RuntimeError("a secret of the house")
            return super().step()

    def load(options: ServerOptions) -> Core:
        core = load_core(options)
        return Core(core.model, FragileEngine(core.model, core.config), core.config, core.tables)

    server, client, _ = await start_server(load)
    stream = client.stream_generate("x", request_id="r-9", **ENDLESS)
    async with asyncio.timeout(WAIT_S), aclosing(stream) as events:
        await anext(events)
        broken.set()
        with pytest.raises(RemoteError, match=r"INTERNAL.*r-9") as caught:
            async for _ in events:
                pass
        assert "secret" not in str(caught.value)
        assert isinstance(await server.crashed, RuntimeError)
        with pytest.raises(RemoteError, match="INTERNAL"):
            await client.generate("y", max_new_tokens=1)


async def test_a_second_server_cannot_take_the_same_port(start_server: StartServer) -> None:
    _, _, address = await start_server()
    second = Server(ServerOptions(port=int(address.rsplit(":", 1)[1])))
    with pytest.raises(InvalidArgument, match="Address already in use"):
        await second.bind()
    await second.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.invalid"])
def test_plain_text_needs_loopback_or_insecure_bind(host: str) -> None:
    with pytest.raises(InvalidArgument, match="--insecure-bind"):
        _ = ServerOptions(host=host).address
    assert ServerOptions(host=host, insecure_bind=True).address.endswith(":50051")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_insecure_bind(host: str) -> None:
    assert ServerOptions(host=host).address.endswith(":50051")
