"""The engine's thread and readers that leave early, are slow, or stop reading."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from a2sf.errors import Aborted, InvalidArgument
from a2sf.requests import Finished
from service.backend.runner import EngineRunner
from tests.service.conftest import WAIT_S, until
from tests.service.scripted import (
    ScriptedEngine,
    let_it_go,
    let_it_step,
    request,
    take,
)


async def test_leaving_early_frees_the_request_and_its_id() -> None:
    runner, engine = EngineRunner(), ScriptedEngine()
    await runner.start(lambda: engine)
    await take(runner, "a", 2)
    await take(runner, "a", 2)
    assert runner.active == 0
    await runner.stop(WAIT_S)
    assert engine.cancelled == ["a", "a"]
    assert not engine.has_work


async def test_only_a_reader_that_stops_loses_its_stream() -> None:
    runner = EngineRunner(max_unread=4)
    engine = ScriptedEngine(permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(runner.stream(request("swift"))) as swift,
        aclosing(runner.stream(request("slow"))) as slow,
    ):

        async def step() -> None:
            let_it_step(engine)
            await anext(swift)

        await step()
        reading = asyncio.create_task(anext(slow))
        # One is read and four are not.
        while engine.said.get("slow", 0) < 5:
            await step()
        await reading
        assert (runner.active, runner.unread) == (2, 4)
        # One too many; the thread may begin another step before it hears of it.
        await step()
        await step()
        await step()
        assert engine.cancelled == ["slow"]
        assert list(engine.rows) == ["swift"]
        assert runner.unread == 0
        with pytest.raises(Aborted, match="stopped reading: 4 events wait"):
            await anext(slow)
        await step()
        let_it_go(engine)
    assert await runner.stop(WAIT_S)
    assert engine.cancelled == ["slow", "swift"]


async def test_a_late_reader_gets_all_queued_events() -> None:
    runner = EngineRunner(max_unread=4)
    engine = ScriptedEngine(permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a", 4))) as events:
        let_it_step(engine)
        await anext(events)
        let_it_go(engine)
        await until(lambda: not engine.has_work)
        # What the thread has posted by now is delivered before the word of another.
        await take(runner, "b", 2, max_new_tokens=1)
        assert len([event async for event in events]) == 4
    await runner.stop(WAIT_S)


async def test_the_last_event_also_aborts_a_stream_whose_queue_is_full() -> None:
    runner = EngineRunner(max_unread=4)
    engine = ScriptedEngine(permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a", 5))) as events:
        let_it_step(engine)
        await anext(events)
        let_it_go(engine)
        await until(lambda: "a" in engine.cancelled)
        with pytest.raises(Aborted, match="stopped reading"):
            await anext(events)
    assert runner.active == 0
    await runner.stop(WAIT_S)


async def test_an_id_is_free_after_its_stopped_reader_has_left() -> None:
    runner = EngineRunner(max_unread=2)
    engine = ScriptedEngine(permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as events:
        let_it_step(engine)
        await anext(events)
        let_it_go(engine)
        await until(lambda: engine.cancelled == ["a"])
        with pytest.raises(InvalidArgument, match="running request"):
            await take(runner, "a", 1)
    *_, last = await take(runner, "a", 2, max_new_tokens=1)
    assert isinstance(last, Finished)
    await runner.stop(WAIT_S)
    assert engine.cancelled == ["a"]


@pytest.mark.parametrize("leave", ["cancelled", "deadline"])
async def test_leaving_while_queued_frees_the_place(leave: str) -> None:
    runner, engine = EngineRunner(), ScriptedEngine(max_batch=1)
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as first:
        await anext(first)
        queued = asyncio.create_task(take(runner, "b", 1))
        await until(lambda: runner.load.waiting == 1)
        if leave == "cancelled":
            queued.cancel()
            with pytest.raises(asyncio.CancelledError):
                await queued
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(queued, 0.01)
        assert runner.active == 1
        await until(lambda: engine.cancelled == ["b"])
        assert not engine.waiting
    await runner.stop(WAIT_S)


async def test_a_cancelled_request_is_removed_before_the_next_step() -> None:
    runner = EngineRunner()
    engine = ScriptedEngine(permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as stays:
        let_it_step(engine)
        await anext(stays)
        async with aclosing(runner.stream(request("b"))) as leaves:
            let_it_step(engine, 2)
            await anext(leaves)
            await until(lambda: engine.steps == 4)
            said = engine.said["b"]
        # The thread is in a step and has not read the inbox; no further step is allowed.
        let_it_step(engine)
        await until(lambda: engine.cancelled == ["b"])
        assert engine.said["b"] <= said + 1
        let_it_go(engine)
    await runner.stop(WAIT_S)


async def test_a_request_cancelled_in_the_inbox_is_not_validated() -> None:
    runner = EngineRunner()
    engine = ScriptedEngine(permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as stays:
        let_it_step(engine)
        await anext(stays)
        await until(lambda: engine.steps == 2)
        gone = asyncio.create_task(take(runner, "b", 1))
        await until(lambda: runner.active == 2)
        gone.cancel()
        await asyncio.wait({gone})
        # The id is taken again, by a reader that stays for its one word.
        again = asyncio.create_task(take(runner, "b", 2, max_new_tokens=1))
        await until(lambda: runner.active == 2)
        let_it_go(engine)
        assert isinstance((await again)[-1], Finished)
    await runner.stop(WAIT_S)
    assert engine.submitted == ["a", "b"]
