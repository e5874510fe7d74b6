"""Completions on a real port: streams, whole responses, and refused requests."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from a2sf.errors import InvalidArgument, InvalidRequest, NotFound, ResourceExhausted
from a2sf.policy import CachePolicy
from a2sf.requests import Delta, Finished, FinishReason, Sampling
from service.client.results import StreamEvent, StreamStarted
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.conversions import requests
from service.rpc.lifecycle import MAX_PREPARING
from service.server import Server
from service.status import RemoteError, from_wire
from tests.service.conftest import ENDLESS, WAIT_S, StartServer, until

GREEDY = Sampling(temperature=0.0)


async def read(events: AsyncGenerator[StreamEvent, None]) -> list[StreamEvent]:
    async with asyncio.timeout(WAIT_S), aclosing(events):
        return [event async for event in events]


def idle(server: Server) -> bool:
    engine = server.core.engine
    return not engine.running and not engine.waiting and not server.num_calls


async def test_a_stream_has_one_start_then_deltas_then_one_finish(
    start_server: StartServer,
) -> None:
    server, client, _ = await start_server()
    policy = CachePolicy(alpha=0.5, budget=16, recent=2)
    events = await read(
        client.stream_generate(
            "Forget me not. " * 3,
            max_new_tokens=8,
            sampling=Sampling(seed=7),
            ignore_eos=True,
            cache_policy=policy,
            request_id="r-1",
            token_ids=True,
        )
    )
    started, *deltas, finished = events
    assert isinstance(started, StreamStarted)
    assert (started.request_id, started.seed, started.alpha) == ("r-1", 7, 0.5)
    assert (started.method, started.budget, started.recent) == ("a2sf", 16, 2)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert sum(len(d.token_ids) for d in deltas if isinstance(d, Delta)) == 8
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.LENGTH
    assert finished.usage.prompt_tokens == started.prompt_tokens
    assert finished.usage.completion_tokens == 8
    assert finished.cache.kept_tokens == 16
    assert finished.cache.evicted_tokens > 0
    await until(lambda: idle(server))


async def test_generate_returns_the_same_as_the_stream(start_server: StartServer) -> None:
    _, client, _ = await start_server()
    options: dict[str, Any] = {"max_new_tokens": 12, "sampling": Sampling(seed=3)}
    whole = await client.generate("One, two", **options)
    events = await read(client.stream_generate("One, two", **options))
    assert whole.text == "".join(e.text for e in events if isinstance(e, Delta))
    assert whole.token_ids == ()
    assert whole.started.seed == 3


async def test_requests_of_different_policies_share_a_batch(start_server: StartServer) -> None:
    _, client, _ = await start_server(max_batch=4)
    policies = [
        CachePolicy(preset="window", budget=12),
        CachePolicy(preset="h2o", budget=20),
        CachePolicy(alpha=0.9, budget=16),
        CachePolicy(preset="random", budget=16, random_seed=5),
    ]

    async def complete(policy: CachePolicy) -> tuple[int, ...]:
        answer = await client.generate(
            "Shared batch",
            max_new_tokens=24,
            sampling=GREEDY,
            ignore_eos=True,
            cache_policy=policy,
            token_ids=True,
        )
        return answer.token_ids

    alone = [await complete(policy) for policy in policies]
    together = await asyncio.gather(*(complete(policy) for policy in policies))
    assert together == alone


async def test_token_id_prompts_are_used_unchanged(start_server: StartServer) -> None:
    server, client, _ = await start_server()
    text = "As they are"
    by_text = await client.generate(text, max_new_tokens=4, sampling=GREEDY)
    ids = server.core.model.encode(text)
    assert (await client.generate(ids, max_new_tokens=4, sampling=GREEDY)).text == by_text.text


async def test_a_stop_string_ends_the_completion_and_is_named(start_server: StartServer) -> None:
    _, client, _ = await start_server()
    whole = await client.generate("Stop", max_new_tokens=40, sampling=GREEDY, ignore_eos=True)
    stop = whole.text[5:7]
    cut = await client.generate(
        "Stop", max_new_tokens=40, sampling=GREEDY, ignore_eos=True, stop=[stop]
    )
    assert cut.finished.reason is FinishReason.STOP
    assert cut.finished.matched_stop == stop
    assert cut.text == whole.text[: whole.text.index(stop)]


async def test_leaving_a_stream_frees_its_row(start_server: StartServer) -> None:
    server, client, _ = await start_server(max_batch=1)
    async with asyncio.timeout(WAIT_S), aclosing(client.stream_generate("x", **ENDLESS)) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    await until(lambda: idle(server))
    await client.generate("y", max_new_tokens=2, timeout_s=WAIT_S)


async def test_a_cancelled_generate_call_frees_its_row(start_server: StartServer) -> None:
    server, client, _ = await start_server(max_batch=1)
    call = asyncio.create_task(client.generate("x", **ENDLESS))
    await until(lambda: server.core.engine.running == 1)
    call.cancel()
    await asyncio.wait({call}, timeout=WAIT_S)
    assert call.cancelled()
    await until(lambda: idle(server))


async def test_few_prompts_are_prepared_together_and_a_cancelled_one_keeps_its_place_until_done(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client, _ = await start_server(max_batch=2, max_waiting=6)
    reading, go_on = list[str](), threading.Event()
    read_prompt = requests.read_prompt

    def slow(message: Any, *arguments: Any, **named: Any) -> requests.EncodedPrompt:
        reading.append(message.text)
        assert go_on.wait(WAIT_S)
        return read_prompt(message, *arguments, **named)

    monkeypatch.setattr(requests, "read_prompt", slow)
    async with asyncio.timeout(WAIT_S):
        calls = [asyncio.create_task(client.tokenize("x")) for _ in range(MAX_PREPARING)]
        await until(lambda: len(reading) == MAX_PREPARING)
        later = [asyncio.create_task(client.tokenize("late")) for _ in range(2)]
        await until(lambda: server.num_calls == MAX_PREPARING + 2)
        # Other work of threads does not wait behind prompts.
        await asyncio.to_thread(lambda: None)
        for call in (*calls, *later):
            call.cancel()
        await asyncio.wait({*calls, *later})
        # Calls whose prompt is not being prepared have ended; the others have not.
        await until(lambda: server.num_calls == MAX_PREPARING)
        go_on.set()
        await until(lambda: idle(server))
        assert await client.tokenize("x")
    assert reading == ["x"] * (MAX_PREPARING + 1)


@pytest.mark.parametrize("asked", [True, False])
async def test_prompts_and_completions_are_logged_only_with_log_prompts(
    asked: bool, start_server: StartServer
) -> None:
    with capture_logs() as logs:
        server, client, _ = await start_server(log_prompts=asked)
        ids = server.core.model.encode("by its ids")
        by_ids = await client.generate(
            ids, max_new_tokens=3, request_id="ids", sampling=GREEDY, ignore_eos=True
        )
        async with (
            asyncio.timeout(WAIT_S),
            aclosing(client.stream_generate("left", request_id="left", **ENDLESS)) as events,
        ):
            async for event in events:
                if isinstance(event, Delta) and event.text:
                    break
        await until(lambda: idle(server))
    texts = {(line["request_id"], line["event"]): line["text"] for line in logs if "text" in line}
    if not asked:
        assert not texts
        assert "by its ids" not in str(logs)
        return
    assert texts["ids", "prompt"] == server.core.model.tokenizer.decode(ids)
    assert texts["ids", "completion"] == by_ids.text
    assert texts["left", "prompt"] == "left"
    # What was written until the client left.
    assert texts["left", "completion"].startswith(event.text)
    assert {line["log_level"] for line in logs if "text" in line} == {"info"}
    assert "prompts and completions are logged" in {line["event"] for line in logs}


async def test_a_passed_deadline_ends_the_call_and_frees_the_row(start_server: StartServer) -> None:
    server, client, _ = await start_server()
    with pytest.raises(RemoteError, match=r"deadline of 0\.3 s"):
        await read(client.stream_generate("x", timeout_s=0.3, **ENDLESS))
    await until(lambda: idle(server))


async def test_the_id_of_a_running_request_is_refused_until_it_ends(
    start_server: StartServer,
) -> None:
    server, client, _ = await start_server()
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(client.stream_generate("x", request_id="twin", **ENDLESS)) as events,
    ):
        await anext(events)
        with pytest.raises(InvalidArgument, match="running request") as caught:
            await client.generate("x", max_new_tokens=1, request_id="twin")
        assert caught.value.field == "input.request_id"
    await until(lambda: idle(server))
    await client.generate("x", max_new_tokens=1, request_id="twin")


async def test_a_full_server_refuses_first_with_a_retry_delay(
    start_server: StartServer,
) -> None:
    server, client, address = await start_server(max_batch=1, max_waiting=1)
    first = asyncio.create_task(client.generate("x", **ENDLESS))
    await until(lambda: server.core.engine.running == 1)
    second = asyncio.create_task(client.generate("x", **ENDLESS))
    await until(lambda: server.core.engine.waiting == 1)
    with pytest.raises(ResourceExhausted):
        await client.generate("x", max_new_tokens=1)
    async with grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.InferenceServiceStub(channel).StreamGenerate(
            pb.StreamGenerateRequest(input=pb.GenerationInput(text="x", max_new_tokens=1)),
            timeout=WAIT_S,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        # A retry is allowed only for a call that has seen no initial metadata.
        assert not await call.initial_metadata()
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
    for task in (first, second):
        task.cancel()
    await asyncio.wait({first, second}, timeout=WAIT_S)


def generation(**fields: Any) -> pb.GenerationInput:
    return pb.GenerationInput(**{"text": "x", "max_new_tokens": 4, **fields})


REFUSED: dict[str, tuple[pb.GenerationInput, str, str]] = {
    "no prompt": (pb.GenerationInput(max_new_tokens=4), "input.prompt", "text, token_ids, chat"),
    "empty text": (generation(text=""), "input.text", "empty"),
    "no token ids": (
        pb.GenerationInput(token_ids=pb.TokenIds(), max_new_tokens=4),
        "input.token_ids.ids",
        "empty",
    ),
    "unknown token id": (
        pb.GenerationInput(token_ids=pb.TokenIds(ids=[1, 99_999]), max_new_tokens=4),
        "input.prompt",
        "99999",
    ),
    "no length": (generation(max_new_tokens=0), "input.max_new_tokens", "greater than or equal"),
    "beyond the context": (
        generation(max_new_tokens=2_000_000),
        "input.max_new_tokens",
        "2000000 after a prompt of 1 tokens make 2000001; the model's context is 1000000",
    ),
    "alpha": (
        generation(cache_policy=pb.CachePolicy(alpha=1.5)),
        "input.cache_policy.alpha",
        "1.5",
    ),
    "budget 0": (
        generation(cache_policy=pb.CachePolicy(preset=pb.CACHE_PRESET_H2O, budget=0)),
        "input.cache_policy.budget",
        "greater than or equal to 1",
    ),
    "budget beyond the slots": (
        generation(cache_policy=pb.CachePolicy(budget=65)),
        "input.cache_policy.budget",
        "64",
    ),
    "no such preset": (
        generation(cache_policy=pb.CachePolicy(preset=99)),  # type: ignore[arg-type]
        "input.cache_policy.preset",
        "h2o",
    ),
    "preset unspecified": (
        generation(cache_policy=pb.CachePolicy(preset=pb.CACHE_PRESET_UNSPECIFIED)),
        "input.cache_policy.preset",
        "window",
    ),
    "contradiction": (
        generation(cache_policy=pb.CachePolicy(preset=pb.CACHE_PRESET_FULL, budget=9)),
        "input.cache_policy",
        "preset full keeps every token",
    ),
    "temperature": (
        generation(sampling=pb.Sampling(temperature=-1.0)),
        "input.sampling.temperature",
        "-1.0",
    ),
    "not a number": (
        generation(sampling=pb.Sampling(temperature=float("nan"))),
        "input.sampling.temperature",
        "finite",
    ),
    "top_p": (generation(sampling=pb.Sampling(top_p=0.0)), "input.sampling.top_p", "0.0"),
    "seed": (generation(sampling=pb.Sampling(seed=2**63)), "input.sampling.seed", "less than"),
    "empty stop string": (generation(stop=["a", ""]), "input.stop[1]", "at least 1 character"),
    "unknown stop token": (
        generation(stop_token_ids=[99_999]),
        "input.stop_token_ids",
        "99999",
    ),
    "request id": (generation(request_id="a\nb"), "input.request_id", "A-Z"),
}


async def test_a_value_out_of_range_is_refused_with_its_field(start_server: StartServer) -> None:
    server, client, address = await start_server()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        for name, (message, field, problem) in REFUSED.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(input=message), timeout=WAIT_S)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            error = from_wire(caught.value)
            assert isinstance(error, InvalidRequest), name
            assert error.field == field, name
            assert problem in error.problem, (name, error.problem)
    assert idle(server)
    await client.generate("still here", max_new_tokens=1)


async def test_an_unknown_table_is_not_found(start_server: StartServer) -> None:
    _, client, _ = await start_server()
    with pytest.raises(NotFound, match="no alpha table 'mathqa'; served: none"):
        await client.generate("x", max_new_tokens=1, cache_policy=CachePolicy(table="mathqa"))


async def test_many_requests_with_early_cancels_leave_no_state(
    start_server: StartServer,
) -> None:
    server, client, _ = await start_server(max_batch=4, max_waiting=64)

    async def one(number: int) -> str:
        stream = client.stream_generate("x" * (number % 7 + 1), max_new_tokens=6, ignore_eos=True)
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return "whole"
                if number % 3 == 0:
                    return "left"
        return "cut"

    async with asyncio.timeout(WAIT_S):
        ends = await asyncio.gather(*(one(number) for number in range(48)))
    assert [ends.count(end) for end in ("whole", "left", "cut")] == [32, 16, 0]
    await until(lambda: idle(server))
