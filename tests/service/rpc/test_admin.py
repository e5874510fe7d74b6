"""The admin service: changing tables while serving, aborting requests, and the load."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from a2sf.errors import (
    A2SFError,
    Aborted,
    Conflict,
    InvalidArgument,
    NotFound,
    TableCorrupt,
    TableInvalid,
)
from a2sf.model.loader import load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Sampling
from a2sf.schema import ModelIdentity
from a2sf.tablefile import save_table
from service.client import Client
from service.client.results import Delta, StreamEvent, StreamStarted
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.admin import AdminServicer
from service.server import Server
from service.status import from_wire
from tests.service.conftest import ENDLESS, WAIT_S, StartServer, until
from tests.tables import make_table


@pytest.fixture(scope="module")
def identity(long_model_dir: Path) -> ModelIdentity:
    return load_model(str(long_model_dir), device="cpu").identity


@pytest.fixture
def directory(tmp_path: Path, identity: ModelIdentity) -> Path:
    folder = tmp_path / "tables"
    folder.mkdir()
    save_table(make_table(identity, name="one"), folder / "one.json")
    save_table(make_table(identity, name="two", budget=12), folder / "two.json")
    wide = make_table(identity, name="wide", budget=40, layer_share=(4.0, 1.0, 1.0))
    save_table(wide, folder / "wide.json")
    (folder / "bad.json").write_text("{")
    return folder


class Admin:
    """Calls the admin service as a client would, failures turned back into errors."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub = pb_grpc.AdminServiceStub(channel)
        self._activate, self._reload = stub.ActivateAlphaTable, stub.ReloadAlphaTables
        self._abort, self._load = stub.AbortRequests, stub.GetLoad

    async def activate(self, name: str, etag: str) -> pb.ActivateAlphaTableResponse:
        return await self._call(self._activate, pb.ActivateAlphaTableRequest(name=name, etag=etag))

    async def reload(self) -> pb.ReloadAlphaTablesResponse:
        return await self._call(self._reload, pb.ReloadAlphaTablesRequest())

    async def abort(self, *ids: str, everything: bool = False) -> list[str]:
        request = pb.AbortRequestsRequest(request_ids=ids, all=everything)
        return list((await self._call(self._abort, request)).request_ids)

    async def load(self) -> pb.GetLoadResponse:
        return await self._call(self._load, pb.GetLoadRequest())

    async def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return await method(request, timeout=WAIT_S)
        except grpc.aio.AioRpcError as error:
            raise from_wire(error) from error


@asynccontextmanager
async def administering(server: Server) -> AsyncIterator[Admin]:
    """Put the admin service of `server` on a separate port."""
    bare = grpc.aio.server()
    pb_grpc.add_AdminServiceServicer_to_server(AdminServicer(server._backend), bare)
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Admin(channel)
    finally:
        await bare.stop(None)


async def method_of(client: Client) -> str:
    answer = await client.generate("x", max_new_tokens=1)
    return answer.started.table_name or answer.started.method


async def test_requests_that_name_no_method_use_the_activated_table(
    start_server: StartServer, directory: Path
) -> None:
    server, client, _ = await start_server(tables=directory)
    etag = server.core.tables.now.etag
    assert await method_of(client) == "a2sf"
    async with administering(server) as admin:
        first = await admin.activate("one", etag)
        assert (first.default_table, first.etag) == ("one", server.core.tables.now.etag)
        assert await method_of(client) == "one"
        with pytest.raises(Conflict, match="call ListAlphaTables again"):
            await admin.activate("two", etag)
        assert await method_of(client) == "one"
        with capture_logs() as lines:
            second = await admin.activate("two", first.etag)
        (line,) = [line for line in lines if line["event"] == "default policy"]
        assert line["policy"].startswith("table two, ")
        assert await method_of(client) == "two"
        last = await admin.activate("", second.etag)
        assert (last.default_table, last.etag) == ("", etag)
        assert await method_of(client) == "a2sf"


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("missing", NotFound, "served: one, two, wide"),
        ("../one", NotFound, "served: one, two, wide"),
        ("bad", TableCorrupt, "alpha table bad.json: not whole JSON"),
        ("wide", TableInvalid, "up to 80 slots of layer 0 head 0, which has 64"),
    ],
)
async def test_a_table_that_cannot_be_the_default_is_not_activated(
    start_server: StartServer,
    directory: Path,
    name: str,
    error: type[A2SFError],
    reason: str,
) -> None:
    server, _, _ = await start_server(tables=directory, default_table="one")
    before = server.core.tables.now
    async with administering(server) as admin:
        with pytest.raises(error, match=reason):
            await admin.activate(name, before.etag)
        with pytest.raises(InvalidArgument, match=r"^etag: missing"):
            await admin.activate("two", "")
    assert server.core.tables.now is before


async def test_the_first_default_table_can_be_activated_again(
    start_server: StartServer, directory: Path, identity: ModelIdentity
) -> None:
    shares = (4.0, 1.0, 1.0)
    table = make_table(
        identity, name="ratio", budget=None, budget_ratio=0.2, layer_share=shares, recent=0
    )
    save_table(table, directory / "ratio.json")
    server, _, _ = await start_server(tables=directory, default_table="ratio", default_budget=32)
    async with administering(server) as admin:
        first = await admin.activate("one", server.core.tables.now.etag)
        second = await admin.activate("ratio", first.etag)
        assert second.default_table == "ratio"


async def test_a_reload_lists_changes_and_refused_files(
    start_server: StartServer, directory: Path, identity: ModelIdentity
) -> None:
    server, client, _ = await start_server(tables=directory)
    save_table(make_table(identity, name="new"), directory / "new.json")
    save_table(make_table(identity, name="one", budget=20), directory / "one.json")
    (directory / "two.json").unlink()
    (directory / "wide.json").write_text("{")
    async with administering(server) as admin:
        reloaded = await admin.reload()
        assert (list(reloaded.added), list(reloaded.changed), list(reloaded.removed)) == (
            ["new"],
            ["one"],
            ["two"],
        )
        assert [refused.name for refused in reloaded.refused] == ["bad", "wide"]
        assert reloaded.refused[1].reason.startswith("alpha table wide.json: ")
        listing = await client.list_alpha_tables()
        assert list(listing.served) == ["new", "one", "wide"]
        assert reloaded.etag == server.core.tables.now.etag
        directory.rename(directory.with_name("elsewhere"))
        with pytest.raises(NotFound, match="cannot be listed") as caught:
            await admin.reload()
        assert str(directory) not in str(caught.value)
    assert list((await client.list_alpha_tables()).served) == ["new", "one", "wide"]


async def test_a_server_without_a_directory_has_nothing_to_reload(
    start_server: StartServer,
) -> None:
    server, _, _ = await start_server()
    async with administering(server) as admin:
        with pytest.raises(NotFound, match="without a directory"):
            await admin.reload()


async def collect(client: Client, **settings: Any) -> list[StreamEvent]:
    async with aclosing(client.stream_generate("x", **settings)) as events:
        return [event async for event in events]


def tokens(events: list[StreamEvent]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


async def test_a_running_request_keeps_its_table_when_the_file_changes(
    start_server: StartServer, directory: Path, identity: ModelIdentity
) -> None:
    server, client, _ = await start_server(tables=directory)
    first = server.core.tables.now.lookup("one")
    alphas = ((0.0,) * identity.num_kv_heads,) * identity.num_layers
    second = make_table(identity, name="one", budget=12, alpha=alphas)
    settings: dict[str, Any] = {
        "max_new_tokens": 600,
        "ignore_eos": True,
        "sampling": Sampling(temperature=0.0),
        "token_ids": True,
        "cache_policy": CachePolicy(table="one"),
    }
    undisturbed = await collect(client, **settings)
    async with (
        administering(server) as admin,
        aclosing(client.stream_generate("x", **settings)) as stream,
    ):
        events = [await anext(stream), await anext(stream)]
        save_table(second, directory / "one.json")
        assert list((await admin.reload()).changed) == ["one"]
        assert server.num_calls == 1, "the request is still under way"
        later = await collect(client, **{**settings, "max_new_tokens": 40})
        events += [event async for event in stream]
    assert isinstance(events[0], StreamStarted)
    assert isinstance(later[0], StreamStarted)
    assert events[0].table_sha256 == first.sha256
    assert tokens(events) == tokens(undisturbed)
    assert later[0].table_sha256 == second.sha256
    assert tokens(later) != tokens(undisturbed)[:40], "the tables differ in what they keep"


async def test_a_changed_default_table_logs_the_new_default_policy(
    start_server: StartServer, directory: Path, identity: ModelIdentity
) -> None:
    server, _, _ = await start_server(tables=directory, default_table="one", watch_tables=False)
    async with administering(server) as admin:
        save_table(make_table(identity, name="two", budget=13), directory / "two.json")
        with capture_logs() as lines:
            await admin.reload()
        assert "default policy" not in [line["event"] for line in lines]
        save_table(make_table(identity, name="one", budget=13), directory / "one.json")
        with capture_logs() as lines:
            await admin.reload()
        (line,) = [line for line in lines if line["event"] == "default policy"]
        assert line["policy"].endswith(", budget 13 tokens")


async def test_requests_are_aborted_by_id_or_all_together(start_server: StartServer) -> None:
    server, client, _ = await start_server(max_batch=3)

    async def ended(name: str) -> str:
        with pytest.raises(Aborted) as caught:
            await client.generate("x", request_id=name, **ENDLESS)
        return str(caught.value)

    calls = {name: asyncio.create_task(ended(name)) for name in ("a", "b", "c")}
    async with administering(server) as admin, asyncio.timeout(WAIT_S):
        await until(lambda: server._backend.runner.load.running == 3)
        assert await admin.abort("b", "unknown") == ["b"]
        assert await calls.pop("b")
        assert not any(call.done() for call in calls.values())
        assert sorted(await admin.abort(everything=True)) == ["a", "c"]
        for call in calls.values():
            await call
        assert await admin.abort(everything=True) == []
        await client.generate("x", max_new_tokens=1)
        for ids, everything in (((), False), (("a",), True)):
            with pytest.raises(InvalidArgument, match=r"^request_ids: give either"):
                await admin.abort(*ids, everything=everything)


async def test_the_load_gives_usage_and_limits(start_server: StartServer) -> None:
    server, client, _ = await start_server(max_batch=1, max_waiting=3)
    slab = server.core.engine.kv_slab_bytes
    async with administering(server) as admin:
        idle = await admin.load()
        assert idle == pb.GetLoadResponse(capacity=4, kv_bytes_limit=slab)
        calls = [
            asyncio.create_task(client.generate("x", request_id=name, **ENDLESS))
            for name in ("a", "b")
        ]
        await until(lambda: server._backend.runner.load.waiting == 1)
        await until(lambda: server._backend.runner.load.running == 1)
        busy = await admin.load()
        assert (busy.running, busy.waiting, busy.admitted, busy.capacity) == (1, 1, 2, 4)
        assert 0 < busy.kv_bytes_used <= slab == busy.kv_bytes_limit
        await admin.abort(everything=True)
        for call in calls:
            with pytest.raises(Aborted):
                await call
        await until(lambda: server._backend.runner.load.running == 0)
        assert await admin.load() == idle
