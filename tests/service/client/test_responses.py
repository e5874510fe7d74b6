"""Results hold everything that the server sent."""

from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from a2sf.errors import (
    Aborted,
    Conflict,
    InvalidArgument,
    InvalidRequest,
    NotFound,
    Unauthenticated,
    Unsupported,
)
from a2sf.requests import Delta, FinishReason, Sampling
from service.backend.loading import Core, load_core
from service.client import AdminClient, ChannelOptions, responses
from service.client.results import Activated, Load, Prompt, Reloaded, StreamStarted
from service.client.results import Delta as TokenDelta
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.status import RemoteError
from tests.service.conftest import ENDLESS, WAIT_S, StartServer

GREEDY: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "ignore_eos": True}

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def load_with_template(options: ServerOptions) -> Core:
    core = load_core(options)
    core.model.tokenizer.chat_template = TEMPLATE
    return core


def test_an_unknown_finish_reason_asks_for_a_newer_client() -> None:
    message = pb.GenerationFinished(reason=99)  # type: ignore[arg-type]
    with pytest.raises(RemoteError, match="upgrade this client"):
        responses.stream_event(pb.StreamGenerateResponse(finished=message), "r")
    assert responses.stream_event(pb.StreamGenerateResponse(), "r") is None


def test_a_listing_has_the_default_and_a_summary_of_each_table() -> None:
    message = pb.ListAlphaTablesResponse(default_table="t", etag="e7")
    message.tables.add(
        name="t", sha256="0" * 64, dataset="mathqa", verdict=pb.TABLE_VERDICT_BETTER
    ).created_at.FromJsonString("2026-01-02T03:04:05Z")
    message.refused.add(name="u", reason="cut short")
    listing = responses.table_listing(message)
    assert (listing.default_table, listing.etag) == ("t", "e7")
    assert (listing.served, listing.refused) == ({"t": "0" * 64}, {"u": "cut short"})
    assert listing.tables["t"].verdict == "better"
    assert listing.tables["t"].dataset == "mathqa"
    assert listing.tables["t"].created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert responses.table_listing(pb.ListAlphaTablesResponse()).default_table is None


def test_results_of_admin_calls_have_every_field() -> None:
    refused = [pb.RefusedAlphaTable(name="d", reason="no JSON")]
    assert responses.reloaded(
        pb.ReloadAlphaTablesResponse(
            added=["a"], changed=["b"], removed=["c"], refused=refused, etag="e"
        )
    ) == Reloaded(added=("a",), changed=("b",), removed=("c",), refused={"d": "no JSON"}, etag="e")
    numbers = {name: index for index, name in enumerate(Load.model_fields)}
    assert responses.load(pb.GetLoadResponse(**numbers)) == Load(**numbers)
    assert {f.name for f in pb.GetLoadResponse.DESCRIPTOR.fields} == set(Load.model_fields)
    answer = pb.ActivateAlphaTableResponse(etag="e")
    assert responses.activated(answer) == Activated(default_table=None, etag="e")


async def test_a_completion_has_the_logprob_of_each_token(start_server: StartServer) -> None:
    _, client, _ = await start_server()
    options: dict[str, Any] = {"token_ids": True, "logprobs": True, "top_logprobs": 2, **GREEDY}
    done = await client.generate("How likely", max_new_tokens=5, echo=True, **options)
    assert tuple(one.token_id for one in done.logprobs) == done.token_ids
    for one in done.logprobs:
        # Greedy: the token that was drawn is the most likely one.
        assert (one.token_id, one.logprob, one.text) == (
            one.top[0].token_id,
            one.top[0].logprob,
            one.top[0].text,
        )
        assert one.text
        assert one.logprob <= 0.0
        assert len(one.top) == 2
    assert done.started.prompt == Prompt(**(await client.tokenize("How likely")).model_dump())
    async with aclosing(
        client.stream_generate("How likely", max_new_tokens=5, **options)
    ) as events:
        streamed = [event async for event in events]
    deltas = [event for event in streamed if isinstance(event, Delta)]
    assert all(isinstance(delta, TokenDelta) for delta in deltas)
    assert tuple(one for delta in deltas for one in delta.logprobs) == done.logprobs
    assert isinstance(streamed[0], StreamStarted)
    assert streamed[0].prompt is None


async def test_finish_reasons_distinguish_a_time_limit_and_a_stop_token(
    start_server: StartServer,
) -> None:
    _, client, _ = await start_server()
    limited = await client.generate("x", **ENDLESS, time_limit_s=0.2, timeout_s=WAIT_S)
    assert limited.finished.reason is FinishReason.TIME_LIMIT
    assert limited.finished.matched_stop_token_id is None
    free = await client.generate("x", max_new_tokens=5, token_ids=True, **GREEDY)
    stopped = await client.generate(
        "x", max_new_tokens=5, stop_token_ids=[free.token_ids[0]], **GREEDY
    )
    assert stopped.finished.reason is FinishReason.STOP
    assert stopped.finished.matched_stop_token_id == free.token_ids[0]
    assert stopped.finished.matched_stop is None


async def test_a_conversation_works_if_the_model_has_a_template(
    start_server: StartServer,
) -> None:
    said = [{"role": "user", "content": "Hello"}]
    _, client, _ = await start_server(load_with_template)
    assert (await client.get_model()).chat
    prompt = await client.tokenize(said)
    assert prompt.text == "<user>Hello<assistant>"
    answer = await client.generate(said, max_new_tokens=3, echo=True, **GREEDY)
    assert answer.started.prompt == Prompt(**prompt.model_dump())
    same = await client.generate(prompt.token_ids, max_new_tokens=3, **GREEDY)
    assert same.text == answer.text

    _, plain, _ = await start_server()
    assert not (await plain.get_model()).chat
    with pytest.raises(Unsupported):
        await plain.generate(said, max_new_tokens=3)


async def test_get_model_describes_the_sizes_of_the_server(start_server: StartServer) -> None:
    server, client, _ = await start_server(max_waiting=7)
    described = await client.get_model()
    shape = server.core.model.shape
    assert described.head_slots == ((64,) * shape.num_kv_heads,) * shape.num_layers
    assert described.max_waiting == 7
    assert described.max_prefill_tokens > 0
    assert described.max_prompt_bytes > 0


async def test_an_admin_client_changes_the_default_table_and_aborts_requests(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "bad.json").write_text("{")
    token = "an-operator-s-own-token"
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o600)
    server, client, _ = await start_server(
        tables=tmp_path / "tables", admin_port=0, admin_token_file=tmp_path / "token"
    )
    target = server.admin_address
    assert target is not None
    async with AdminClient(target) as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.get_load()
    async with (
        AdminClient(target, ChannelOptions(token=token)) as admin,
        aclosing(client.stream_generate("x", request_id="long", **ENDLESS)) as events,
    ):
        await anext(events)
        load = await admin.get_load()
        assert (load.admitted, load.capacity) == (1, server.core.config.max_batch + 64)
        assert await admin.abort_requests(["long", "nobody"]) == ("long",)
        with pytest.raises(Aborted):
            async for _ in events:
                pass
        assert set((await admin.reload_alpha_tables()).refused) == {"bad"}
        etag = (await client.list_alpha_tables()).etag
        with pytest.raises(Conflict):
            await admin.activate_alpha_table(None, etag="of yesterday")
        with pytest.raises(NotFound):
            await admin.activate_alpha_table("nobody", etag=etag)
        activated = await admin.activate_alpha_table(None, etag=etag)
        assert activated.default_table is None
        with pytest.raises(InvalidRequest):
            await admin.abort_requests(["long"], all_requests=True)
        with pytest.raises(InvalidArgument, match="one string"):
            await admin.abort_requests("long")
        assert await admin.abort_requests(all_requests=True) == ()
