"""The engine's thread: complete streams, aborts, and the effects of a crash."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

import pytest

from a2sf.errors import Aborted, InvalidArgument, Unavailable
from a2sf.requests import Delta, Event, Finished, GenerationRequest
from service.backend.engine_protocol import EngineLoad
from service.backend.runner import EngineCrashed, EngineRunner, RequestFailed
from tests.service.conftest import WAIT_S, until
from tests.service.scripted import (
    REFUSED,
    UNLUCKY,
    ScriptedEngine,
    let_it_go,
    let_it_step,
    request,
    take,
)


async def test_the_engine_runs_in_one_thread_outside_the_event_loop() -> None:
    runner, engine = EngineRunner(), ScriptedEngine()
    built_in: list[int] = []

    def build() -> ScriptedEngine:
        built_in.append(threading.get_ident())
        return engine

    await runner.start(build)
    await take(runner, "a", 3)
    assert await runner.stop(WAIT_S)
    assert engine.threads == set(built_in)
    assert threading.get_ident() not in engine.threads


async def test_the_id_of_a_running_request_is_refused() -> None:
    runner = EngineRunner()
    await runner.start(ScriptedEngine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as first:
        await anext(first)
        with pytest.raises(InvalidArgument, match="request_id"):
            await take(runner, "a", 1)
        await anext(first)
    await runner.stop(WAIT_S)


@pytest.mark.parametrize(
    ("tokens", "error"), [(UNLUCKY, RequestFailed), (REFUSED, InvalidArgument)]
)
async def test_a_refused_request_fails_alone(tokens: int, error: type[Exception]) -> None:
    runner = EngineRunner()
    await runner.start(ScriptedEngine)
    with pytest.raises(error):
        await take(runner, "bad", 1, max_new_tokens=tokens)
    assert len(await take(runner, "good", 2)) == 2
    # The id is free, and the refused stream is gone.
    assert len(await take(runner, "bad", 2)) == 2
    assert runner.active == 0
    assert not runner.crashed.done()
    await runner.stop(WAIT_S)


@pytest.mark.parametrize("cause", [RuntimeError("broken"), SystemExit(3), MemoryError()])
async def test_a_crashed_thread_fails_every_stream_and_sets_crashed(cause: BaseException) -> None:
    runner, engine = EngineRunner(), ScriptedEngine()
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as first:
        await anext(first)
        engine.break_with = cause
        with pytest.raises(EngineCrashed):
            async for _ in first:
                pass
        assert await runner.crashed is cause
    with pytest.raises(EngineCrashed):
        await take(runner, "b", 1)
    assert await runner.stop(WAIT_S)


async def test_start_raises_the_error_of_the_build_function() -> None:
    def build() -> ScriptedEngine:
        raise InvalidArgument("model", "none")

    with pytest.raises(InvalidArgument):
        await EngineRunner().start(build)


async def test_stopping_ends_streams_as_unavailable() -> None:
    runner = EngineRunner()
    await runner.start(ScriptedEngine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as first:
        await anext(first)
        assert await runner.stop(WAIT_S)
        with pytest.raises(Unavailable):
            async for _ in first:
                pass
    with pytest.raises(Unavailable):
        await take(runner, "b", 1)


async def test_a_stream_yields_all_events_of_the_engine() -> None:
    runner, engine = EngineRunner(), ScriptedEngine()
    await runner.start(lambda: engine)
    *words, last = await take(runner, "a", 99, max_new_tokens=3)
    assert [type(word) for word in words] == [Delta] * 3
    assert isinstance(last, Finished)
    await runner.stop(WAIT_S)
    # Nobody cancels what has ended by itself.
    assert engine.cancelled == []


async def test_abort_ends_only_the_named_requests_at_once() -> None:
    runner = EngineRunner()
    engine = ScriptedEngine(max_batch=2, permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), AsyncExitStack() as stack:
        streams: dict[str, AsyncGenerator[Event, None]] = {}
        first: dict[str, asyncio.Task[Event]] = {}
        for name in "abc":
            streams[name] = await stack.enter_async_context(aclosing(runner.stream(request(name))))
            first[name] = asyncio.create_task(anext(streams[name]))
        await until(lambda: runner.active == 3)
        let_it_step(engine, 3)
        await first["a"]
        await first["b"]
        await until(lambda: runner.load == EngineLoad(running=2, waiting=1, kv_bytes_used=20))
        # A request with unread events, a waiting one, an unknown one, and a repeated one.
        assert runner.abort(["a", "c", "nobody", "a"]) == ("a", "c")
        assert runner.abort(["a", "c"]) == ()
        for reading in (anext(streams["a"]), first["c"]):
            with pytest.raises(Aborted, match="an operator"):
                await reading
        assert runner.active == 1
        let_it_step(engine)
        await until(lambda: engine.cancelled == ["a", "c"])
        let_it_step(engine)
        assert isinstance(await anext(streams["b"]), Delta)
        assert runner.abort(None) == ("b",)
        with pytest.raises(Aborted, match="an operator"):
            await anext(streams["b"])
        assert runner.abort(None) == ()
        let_it_go(engine)
    await runner.stop(WAIT_S)
    assert engine.cancelled == ["a", "c", "b"]
    assert not engine.has_work


async def test_abort_keeps_a_finished_stream_for_its_reader() -> None:
    runner, engine = EngineRunner(), ScriptedEngine()
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a", 2))) as events:
        await anext(events)
        await until(lambda: not engine.has_work)
        await take(runner, "b", 1)
        assert runner.abort(["a"]) == ()
        runner.fail_all(lambda: Unavailable("closing"))
        assert isinstance([event async for event in events][-1], Finished)
    await runner.stop(WAIT_S)
    assert "a" not in engine.cancelled


async def test_the_load_is_zero_before_the_engine_is_built() -> None:
    runner, engine = EngineRunner(), ScriptedEngine(max_batch=1)
    assert runner.load == EngineLoad(running=0, waiting=0, kv_bytes_used=0)
    await runner.start(lambda: engine)
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(runner.stream(request("a"))) as first,
        aclosing(runner.stream(request("b"))) as second,
    ):
        await anext(first)
        waiting = asyncio.create_task(anext(second))
        await until(lambda: runner.load == EngineLoad(running=1, waiting=1, kv_bytes_used=10))
        waiting.cancel()
        await until(lambda: runner.load == EngineLoad(running=1, waiting=0, kv_bytes_used=10))
    await until(lambda: runner.load == EngineLoad(running=0, waiting=0, kv_bytes_used=0))
    await runner.stop(WAIT_S)


async def test_a_flood_of_requests_does_not_delay_the_steps_of_rows() -> None:
    loop, steps_before = asyncio.get_running_loop(), list[int]()

    class Flooded(ScriptedEngine):
        """By the time that it has taken a request, the next one is there."""

        def submit(self, request: GenerationRequest) -> None:
            super().submit(request)
            steps_before.append(self.steps)
            asyncio.run_coroutine_threadsafe(another(), loop).result(WAIT_S)

    runner, engine = EngineRunner(), Flooded()
    tasks: list[asyncio.Task[list[Event]]] = []

    async def another() -> None:
        if len(tasks) < 50:
            tasks.append(asyncio.create_task(take(runner, f"r{len(tasks)}", 1)))
            # It gets as far as waiting for its first word.
            await asyncio.sleep(0)

    await runner.start(lambda: engine)
    await another()
    await until(lambda: len(steps_before) == 50)
    assert len(set(steps_before)) == 50
    await asyncio.gather(*tasks)
    await runner.stop(WAIT_S)
