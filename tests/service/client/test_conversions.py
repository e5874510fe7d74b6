"""What the client asks for is what is sent, and what is answered is what it tells."""

import math
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import FloatValue

from a2sf.errors import (
    Aborted,
    Conflict,
    InvalidArgument,
    InvalidRequest,
    NotFound,
    Unauthenticated,
    Unsupported,
)
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, FinishReason, Sampling
from service.backend.loading import Core, load_core
from service.client import AdminClient, ChannelOptions, ChatMessage, Tls, conversions
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


def test_every_field_of_a_request_can_be_asked_for() -> None:
    message = conversions.generation_input(
        "x",
        9,
        {
            "request_id": "r",
            "min_new_tokens": 2,
            "time_limit_s": 1.5,
            "sampling": Sampling(repetition_penalty=1.2, top_k=3, seed=0, min_p=0.1, top_p=0.5),
            "stop": ["a"],
            "stop_token_ids": [1],
            "ignore_eos": True,
            "cache_policy": conversions.CachePolicy(budget=3),
            "token_ids": True,
            "logprobs": True,
            "top_logprobs": 4,
            "echo": True,
        },
    )
    sent = {field.name for field, _ in message.ListFields()}
    assert sent == {f.name for f in pb.GenerationInput.DESCRIPTOR.fields} - {"token_ids", "chat"}
    for part in (message.sampling, message.output):
        assert {f.name for f, _ in part.ListFields()} == {f.name for f in part.DESCRIPTOR.fields}
    assert message.time_limit_seconds == 1.5
    assert message.sampling.repetition_penalty == 1.2


def test_a_request_that_asks_for_nothing_sets_no_time_limit() -> None:
    message = conversions.generation_input("x", 9, {})
    assert not message.HasField("time_limit_seconds")
    assert not message.output.ListFields()


def test_a_conversation_is_given_as_values_or_as_mappings() -> None:
    by_value = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content=""),
    ]
    by_mapping = [dict(message) for message in by_value]
    assert conversions.tokenize_request(by_value) == conversions.tokenize_request(by_mapping)
    message = conversions.generation_input(by_mapping, 1, {})
    assert [(m.role, m.content) for m in message.chat.messages] == [
        ("system", "Be brief."),
        ("user", ""),
    ]


@pytest.mark.parametrize(
    ("prompt", "field", "problem"),
    [
        (b"bytes", "input.prompt", "decode them"),
        ([1, {"role": "user", "content": "x"}], "input.prompt", "give either"),
        ([{"role": "user"}], "input.chat.messages[0].content", "required"),
        (
            [{"role": "user", "content": "x"}, {"role": "a b", "content": "x"}],
            "input.chat.messages[1].role",
            "pattern",
        ),
        ([{"role": "user", "content": "x", "name": "y"}], "input.chat.messages[0].name", "no such"),
        (["text"], "input.chat.messages[0]", "accepted: a ChatMessage, or a mapping"),
        ([2**32], "input.token_ids.ids", "out of range"),
        ("\ud800", "input.text", "surrogate"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_place(prompt: Any, field: str, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem) as caught:
        conversions.generation_input(prompt, 1, {})
    assert caught.value.field == field


def test_all_that_does_not_fit_its_field_is_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        conversions.generation_input(
            b"bytes", 2**32, {"stop": "one", "top_logprobs": -1, "stop_token_ids": [-1]}
        )
    assert sorted(field for field, _ in caught.value.violations) == [
        "input.max_new_tokens",
        "input.output.top_logprobs",
        "input.prompt",
        "input.stop",
        "input.stop_token_ids",
    ]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CachePolicy(preset="h20", budget=0), "did you mean h2o.*; budget: .*(got 0)"),
        (lambda: Sampling(temprature=1.0), "temprature: no such field; .*did you mean temperature"),
        (lambda: ChatMessage(role="a b", content="x"), "^role: "),
        (lambda: ChannelOptions(token=5), "^token: "),
        (lambda: Tls(root_ca="here"), "^root_ca: "),
    ],
    ids=["policy", "sampling", "message", "channel", "tls"],
)
def test_what_callers_make_is_refused_by_our_own_error(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        make()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"min_new_tokens": -1}, "input.min_new_tokens"),
        ({"top_logprobs": -1}, "input.output.top_logprobs"),
        ({"stop_token_ids": [-1]}, "input.stop_token_ids"),
        ({"stop": "one"}, "input.stop"),
        ({"request_id": "\ud800"}, "input.request_id"),
        ({"time_limit_s": math.inf}, "input.time_limit_seconds"),
        ({"time_limit_s": -math.inf}, "input.time_limit_seconds"),
        ({"time_limit_s": math.nan}, "input.time_limit_seconds"),
        ({"time_limit_s": 10**400}, "input.time_limit_seconds"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_by_its_field(options: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        conversions.generation_input("x", 1, options)
    assert caught.value.field == field


def test_a_number_that_its_field_cannot_hold_is_told_with_what_it_can() -> None:
    with pytest.raises(InvalidArgument, match="-1; accepted: 0 to 4294967295"):
        conversions.generation_input("x", -1, {})


def test_a_number_too_large_for_a_float_does_not_become_infinite() -> None:
    """The contract has none yet, and protobuf would not tell."""
    assert FloatValue(value=1e40).value == math.inf
    with pytest.raises(InvalidArgument, match=r"input\.value: 1e\+40 is no finite number"):
        conversions._written(FloatValue, "input.", value=1e40)


@pytest.mark.parametrize("prompt", [[], [1, 2], b"x"])
def test_token_ids_are_not_encoded_again(prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="prompt: "):
        conversions.tokenize_request(prompt)


def test_a_finish_that_is_newer_than_the_client_is_told_as_such() -> None:
    message = pb.GenerationFinished(reason=99)  # type: ignore[arg-type]
    with pytest.raises(RemoteError, match="upgrade this client"):
        conversions.stream_event(pb.StreamGenerateResponse(finished=message), "r")
    assert conversions.stream_event(pb.StreamGenerateResponse(), "r") is None


def test_a_listing_tells_the_default_and_each_table_in_short() -> None:
    message = pb.ListAlphaTablesResponse(default_table="t", etag="e7")
    message.tables.add(
        name="t", sha256="0" * 64, dataset="mathqa", verdict=pb.TABLE_VERDICT_BETTER
    ).created_at.FromJsonString("2026-01-02T03:04:05Z")
    message.refused.add(name="u", reason="cut short")
    listing = conversions.table_listing(message)
    assert (listing.default_table, listing.etag) == ("t", "e7")
    assert (listing.served, listing.refused) == ({"t": "0" * 64}, {"u": "cut short"})
    assert listing.tables["t"].verdict == "better"
    assert listing.tables["t"].dataset == "mathqa"
    assert listing.tables["t"].created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert conversions.table_listing(pb.ListAlphaTablesResponse()).default_table is None


def test_what_admin_calls_answer_is_told_whole() -> None:
    refused = [pb.RefusedAlphaTable(name="d", reason="no JSON")]
    assert conversions.reloaded(
        pb.ReloadAlphaTablesResponse(
            added=["a"], changed=["b"], removed=["c"], refused=refused, etag="e"
        )
    ) == Reloaded(added=("a",), changed=("b",), removed=("c",), refused={"d": "no JSON"}, etag="e")
    numbers = {name: index for index, name in enumerate(Load.model_fields)}
    assert conversions.load(pb.GetLoadResponse(**numbers)) == Load(**numbers)
    assert {f.name for f in pb.GetLoadResponse.DESCRIPTOR.fields} == set(Load.model_fields)
    answer = pb.ActivateAlphaTableResponse(etag="e")
    assert conversions.activated(answer) == Activated(default_table=None, etag="e")


async def test_a_completion_tells_how_likely_each_token_was(start_server: StartServer) -> None:
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


async def test_a_time_limit_and_a_stop_token_are_told_as_what_they_were(
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


async def test_a_conversation_is_answered_where_the_model_has_a_template(
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


async def test_the_room_is_described(start_server: StartServer) -> None:
    server, client, _ = await start_server(max_waiting=7)
    described = await client.get_model()
    shape = server.core.model.shape
    assert described.head_slots == ((64,) * shape.num_kv_heads,) * shape.num_layers
    assert described.max_waiting == 7
    assert described.max_prefill_tokens > 0
    assert described.max_prompt_bytes > 0


async def test_an_operator_changes_what_is_served_and_ends_what_runs(
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


def test_an_option_that_there_is_not_is_refused_rather_than_left_out() -> None:
    with pytest.raises(TypeError, match=r"temperature; accepted: .*sampling"):
        conversions.generation_input("x", 1, {"temperature": 0.0})  # type: ignore[typeddict-unknown-key]
