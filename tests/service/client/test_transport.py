"""Calls: retries, deadlines, cancellation and errors, with asyncio and with threads."""

import asyncio
import inspect
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from itertools import pairwise
from typing import Any

import grpc
import pytest

from a2sf.errors import Aborted, InvalidArgument, ResourceExhausted, Unavailable
from a2sf.requests import Delta, Finished
from service.client import (
    AdminClient,
    Client,
    SyncAdminClient,
    SyncClient,
)
from service.client.results import StreamEvent, StreamStarted
from service.client.transport import MAX_TIMEOUT_S
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.status import Cancelled, DeadlineExceeded, NoRoom, to_wire
from tests.service.conftest import ENDLESS, WAIT_S, StartServer, until

Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[[Context, int], Awaitable[None]]
Collect = Callable[..., Awaitable[list[StreamEvent]]]

STARTED = pb.StreamGenerateResponse(
    started=pb.GenerationStarted(
        request_id="r", cache_policy=pb.EffectiveCachePolicy(alpha=0.5, budget=8)
    )
)
DELTA = pb.StreamGenerateResponse(delta=pb.GenerationDelta(text="a"))
FINISHED = pb.StreamGenerateResponse(
    finished=pb.GenerationFinished(
        reason=pb.FINISH_REASON_LENGTH, cache=pb.CacheStatistics(budget=8)
    )
)


class Fake(pb_grpc.InferenceServiceServicer):
    """Answers each attempt at a stream by a given function, and counts the attempts."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.attempts = 0

    async def StreamGenerate(  # type: ignore[override]  # noqa: N802
        self, request: pb.StreamGenerateRequest, context: Context
    ) -> None:
        self.attempts += 1
        await self.answer(context, self.attempts)

    Generate: Any = None
    Tokenize: Any = None


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[Fake, str]]:
    server, fake = grpc.aio.server(), Fake(answer)
    pb_grpc.add_InferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def by_asyncio(target: str, timeout_s: float, prompt: str = "x") -> list[StreamEvent]:
    async with Client(target) as client:
        stream = client.stream_generate(prompt, max_new_tokens=1, timeout_s=timeout_s)
        return [event async for event in stream]


async def by_threads(target: str, timeout_s: float, prompt: str = "x") -> list[StreamEvent]:
    def collect() -> list[StreamEvent]:
        with SyncClient(target) as client:
            return list(client.stream_generate(prompt, max_new_tokens=1, timeout_s=timeout_s))

    return await asyncio.to_thread(collect)


both = pytest.mark.parametrize("collect", [by_asyncio, by_threads])


async def fail(context: Context, error: Exception) -> None:
    status = to_wire(error, "r")
    await context.abort(status.code, status.details, status.trailers)


async def whole(context: Context) -> None:
    for message in (STARTED, DELTA, FINISHED):
        await context.write(message)


@both
async def test_a_full_server_is_retried_after_its_delay(collect: Collect) -> None:
    times: list[float] = []

    async def answer(context: Context, attempt: int) -> None:
        times.append(time.monotonic())
        if attempt <= 2:
            await fail(context, ResourceExhausted("full"))
        await whole(context)

    async with serving(answer) as (fake, target):
        events = await collect(target, WAIT_S)
    assert fake.attempts == 3
    assert [type(event) for event in events[::2]] == [StreamStarted, Finished]
    # The server's half second, where a first backoff is at most 0.24 s.
    assert all(after - before > 0.45 for before, after in pairwise(times))


@both
async def test_unavailable_before_the_start_is_retried(collect: Collect) -> None:
    async def answer(context: Context, attempt: int) -> None:
        if attempt == 1:
            await fail(context, Unavailable("not yet"))
        await whole(context)

    async with serving(answer) as (fake, target):
        assert len(await collect(target, WAIT_S)) == 3
    assert fake.attempts == 2


@both
async def test_a_server_that_stays_unavailable_is_reported_after_four_attempts(
    collect: Collect,
) -> None:
    async with serving(lambda context, _: fail(context, Unavailable("not yet"))) as (fake, to):
        with pytest.raises(Unavailable, match="not yet"):
            await collect(to, WAIT_S)
    assert fake.attempts == 4


@both
async def test_a_call_ends_if_its_server_is_gone_at_the_retry(collect: Collect) -> None:
    async def answer(context: Context, _: int) -> None:
        await asyncio.gather(stack.aclose(), fail(context, Unavailable("going")))

    async with AsyncExitStack() as stack, asyncio.timeout(WAIT_S):
        _, target = await stack.enter_async_context(serving(answer))
        with pytest.raises(Unavailable, match=r"connection to .* failed"):
            await collect(target, 20)


@both
async def test_a_prompt_of_one_mib_is_retried_too(collect: Collect) -> None:
    async def answer(context: Context, attempt: int) -> None:
        if attempt == 1:
            await fail(context, Unavailable("not yet"))
        await whole(context)

    async with serving(answer) as (fake, target):
        assert len(await collect(target, WAIT_S, "x" * 2**20)) == 3
    assert fake.attempts == 2


@both
async def test_a_full_server_is_reported_after_four_attempts_with_its_delay(
    collect: Collect,
) -> None:
    async with serving(lambda context, _: fail(context, ResourceExhausted("full"))) as (fake, to):
        with pytest.raises(NoRoom, match="full") as caught:
            await collect(to, WAIT_S)
    assert caught.value.retry_after_s == 0.5
    assert fake.attempts == 4


@both
@pytest.mark.parametrize(
    "error", [Unavailable("broken"), ResourceExhausted("full"), Aborted("asked to")]
)
async def test_a_stream_that_fails_after_its_start_is_not_retried(
    collect: Collect, error: Exception
) -> None:
    async def answer(context: Context, _: int) -> None:
        await context.write(STARTED)
        await context.write(DELTA)
        await fail(context, error)

    async with serving(answer) as (fake, target):
        with pytest.raises(type(error), match=str(error)):
            await collect(target, WAIT_S)
    assert fake.attempts == 1


@both
async def test_a_hanging_server_fails_at_the_deadline(collect: Collect) -> None:
    gone = asyncio.Event()

    async def answer(context: Context, _: int) -> None:
        await context.write(STARTED)
        try:
            await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            gone.set()
            raise

    async with serving(answer) as (_, target):
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.5 s") as caught:
            await collect(target, 0.5)
        assert 0.5 <= time.monotonic() - began < 5
        await asyncio.wait_for(gone.wait(), WAIT_S)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@both
async def test_a_silent_server_fails_at_the_deadline(collect: Collect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(DeadlineExceeded):
        await collect(f"127.0.0.1:{mute.getsockname()[1]}", 0.5)


async def test_closing_the_channel_ends_its_calls_as_cancelled() -> None:
    async def answer(context: Context, _: int) -> None:
        await context.write(STARTED)
        await asyncio.sleep(WAIT_S)

    async def rest(events: Any) -> None:
        async for _ in events:
            pass

    async with serving(answer) as (_, target):
        client = Client(target)
        events = client.stream_generate("x", max_new_tokens=1)
        await anext(events)
        reading = asyncio.create_task(rest(events))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(reading, WAIT_S)

        blocking = SyncClient(target)
        held = blocking.stream_generate("x", max_new_tokens=1)
        await asyncio.to_thread(next, held)
        await asyncio.to_thread(blocking.close)
        with pytest.raises(Cancelled):
            await asyncio.to_thread(next, held)

        for late in (client.get_model(), asyncio.to_thread(blocking.get_model)):
            with pytest.raises(Cancelled, match="channel was closed"):
                await late


async def test_a_cancelled_task_stays_cancelled(start_server: StartServer) -> None:
    server, client, _ = await start_server()
    task = asyncio.create_task(client.generate("x", **ENDLESS))
    await until(lambda: server.num_calls == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not server.num_calls)


async def test_a_stream_left_early_is_cancelled_by_either_client(
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, client, address = await start_server(max_batch=1)

    calls: list[Any] = []

    def held(call: Any) -> Any:
        calls.append(call)
        return call

    def leave_early() -> None:
        with SyncClient(address) as blocking:
            start = blocking._calls.start
            # gRPC cancels a call without references; this test keeps them.
            monkeypatch.setattr(
                blocking._calls, "start", lambda call, timeout_s: held(start(call, timeout_s))
            )
            with closing(blocking.stream_generate("x", **ENDLESS)) as events:
                assert any(isinstance(event, Delta) for event in events)
            # Its channel is still open: closing the stream was enough.
            blocking.generate("y", max_new_tokens=2, timeout_s=WAIT_S)
            for event in blocking.stream_generate("x", **ENDLESS):
                if isinstance(event, Delta):
                    break
            blocking.generate("y", max_new_tokens=2, timeout_s=WAIT_S)

    await asyncio.wait_for(asyncio.to_thread(leave_early), WAIT_S)
    await until(lambda: not server.num_calls)
    async with aclosing(client.stream_generate("x", **ENDLESS)) as events:
        await anext(events)
    await until(lambda: not server.num_calls)


async def test_both_clients_get_the_same_results(start_server: StartServer) -> None:
    _, client, address = await start_server()

    def blocking() -> list[Any]:
        with SyncClient(address) as sync:
            return [sync.get_model(), sync.list_alpha_tables(), sync.tokenize("Both")]

    awaited = [await client.get_model(), await client.list_alpha_tables()]
    assert await asyncio.to_thread(blocking) == [*awaited, await client.tokenize("Both")]


async def test_an_invalid_request_is_refused_before_the_call() -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument, match="out of range"):
            client.stream_generate("x", max_new_tokens=-1)


@pytest.mark.parametrize("timeout_s", [math.inf, math.nan, 1e10, 10**400])
async def test_a_deadline_that_overflows_grpc_is_refused(timeout_s: float) -> None:
    refused = pytest.raises(InvalidArgument, match=r"timeout_s: .*accepted: at most 1e\+09")
    async with Client("127.0.0.1:1") as client:
        with refused:
            await client.get_model(timeout_s=timeout_s)
        with refused:
            await anext(client.stream_generate("x", max_new_tokens=1, timeout_s=timeout_s))
    with SyncClient("127.0.0.1:1") as client:
        with refused:
            client.get_model(timeout_s=timeout_s)
        with refused:
            next(client.stream_generate("x", max_new_tokens=1, timeout_s=timeout_s))


@pytest.mark.parametrize("timeout_s", [0, -1, -math.inf])
async def test_a_passed_deadline_raises_deadline_exceeded(
    start_server: StartServer, timeout_s: float
) -> None:
    _, client, _ = await start_server()
    with pytest.raises(DeadlineExceeded):
        await client.get_model(timeout_s=timeout_s)


async def test_the_longest_deadline_is_accepted(start_server: StartServer) -> None:
    _, client, _ = await start_server()
    assert (await client.get_model(timeout_s=MAX_TIMEOUT_S)).max_batch == 2


def test_a_missing_server_is_reported_with_advice() -> None:
    refused = pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 failed: .* uses plain text")
    with SyncClient("127.0.0.1:1") as client, refused:
        client.get_model()


@pytest.mark.parametrize(("one", "other"), [(Client, SyncClient), (AdminClient, SyncAdminClient)])
def test_both_clients_have_the_same_methods(one: type, other: type) -> None:
    def methods(cls: type) -> dict[str, tuple[list[str], dict[str, Any]]]:
        found = {}
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            if not name.startswith("_"):
                parameters = inspect.signature(method).parameters
                defaults = {key: value.default for key, value in parameters.items()}
                found[name] = (list(parameters), defaults)
        return found

    assert methods(one) == methods(other)
