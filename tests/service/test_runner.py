"""The engine's thread: order, early leaving, slow readers, and what its death means to others."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf.errors import Aborted, InvalidArgument, Unavailable
from a2sf.requests import (
    CacheStatistics,
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Timings,
    Usage,
)
from service.runner import EngineCrashed, EngineRunner, Load
from tests.service.conftest import WAIT_S, until

ENDLESS = 10**6
UNLUCKY, REFUSED = ENDLESS + 13, ENDLESS + 14

STEP_S = 0.0005
"""What a step takes, so that an engine without a pace does not run away from its readers."""


@dataclass
class ScriptedEngine:
    """Says a word a step to each of its rows, as many as asked for, and notes what it is told.

    With `permits` it takes one for each step, and waits in the step until there is one.
    """

    max_batch: int = 100
    permits: threading.Semaphore | None = None
    rows: dict[str, int] = field(default_factory=dict)
    """Words still to be said."""
    said: dict[str, int] = field(default_factory=dict)
    """Words said; each tells by its token how many there were before."""
    queue: dict[str, int] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    steps: int = 0
    """Those begun."""
    break_with: BaseException | None = None

    @property
    def engine(self) -> "ScriptedEngine":
        return self

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.queue)

    @property
    def running(self) -> int:
        return len(self.rows)

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def kv_bytes_used(self) -> int:
        return 10 * len(self.rows)

    def submit(self, request: GenerationRequest) -> None:
        self.threads.add(threading.get_ident())
        if request.max_new_tokens == UNLUCKY:
            raise RuntimeError("unlucky")
        if request.max_new_tokens == REFUSED:
            raise InvalidArgument("max_new_tokens", "refused")
        assert request.request_id not in self.rows.keys() | self.queue.keys(), "an id of two"
        self.submitted.append(request.request_id)
        self.queue[request.request_id] = request.max_new_tokens

    def cancel(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.cancelled.append(request_id)
        self.rows.pop(request_id, None)
        self.queue.pop(request_id, None)

    def step(self) -> list[Event]:
        self.threads.add(threading.get_ident())
        self.steps += 1
        permits = self.permits
        if permits is not None:
            permits.acquire()
        else:
            time.sleep(STEP_S)
        if self.break_with is not None:
            raise self.break_with
        while self.queue and len(self.rows) < self.max_batch:
            name = next(iter(self.queue))
            self.rows[name] = self.queue.pop(name)
            self.said[name] = 0
        events: list[Event] = []
        for name in list(self.rows):
            events.append(Delta(request_id=name, text="word", token_ids=(self.said[name],)))
            self.said[name] += 1
            self.rows[name] -= 1
            if not self.rows[name]:
                del self.rows[name]
                events.append(finished(name))
        return events


def finished(name: str) -> Finished:
    return Finished(
        request_id=name,
        reason=FinishReason.LENGTH,
        matched_stop=None,
        usage=Usage(prompt_tokens=1, completion_tokens=1),
        cache=CacheStatistics(
            budget=1, kept_tokens=1, evicted_tokens=0, kv_bytes=1, kv_bytes_full=1
        ),
        timings=Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0),
    )


def request(name: str, max_new_tokens: int = ENDLESS) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_ids=(1,), max_new_tokens=max_new_tokens)


async def take(
    runner: EngineRunner, name: str, count: int, max_new_tokens: int = ENDLESS
) -> list[Event]:
    """Read `count` events and leave."""
    taken: list[Event] = []
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(runner.stream(request(name, max_new_tokens))) as events,
    ):
        async for event in events:
            taken.append(event)
            if len(taken) == count:
                break
    return taken


def let_it_step(engine: ScriptedEngine, count: int = 1) -> None:
    assert engine.permits is not None
    engine.permits.release(count)


def let_it_go(engine: ScriptedEngine) -> None:
    """Let it step by itself from now on."""
    permits, engine.permits = engine.permits, None
    assert permits is not None
    permits.release()


async def test_the_engine_lives_in_one_thread_that_is_not_the_loop_s() -> None:
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


async def test_leaving_early_frees_the_request_and_its_id() -> None:
    runner, engine = EngineRunner(), ScriptedEngine()
    await runner.start(lambda: engine)
    await take(runner, "a", 2)
    await take(runner, "a", 2)
    assert runner.active == 0
    await runner.stop(WAIT_S)
    assert engine.cancelled == ["a", "a"]
    assert not engine.has_work


async def test_an_id_under_way_is_refused() -> None:
    runner = EngineRunner()
    await runner.start(ScriptedEngine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as first:
        await anext(first)
        with pytest.raises(InvalidArgument, match="request_id"):
            await take(runner, "a", 1)
        await anext(first)
    await runner.stop(WAIT_S)


@pytest.mark.parametrize(("tokens", "error"), [(UNLUCKY, RuntimeError), (REFUSED, InvalidArgument)])
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
async def test_the_thread_s_death_fails_every_stream_and_is_told(cause: BaseException) -> None:
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


async def test_what_building_raises_is_raised_to_who_starts() -> None:
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


async def test_a_stream_is_what_the_engine_said_to_its_end() -> None:
    runner, engine = EngineRunner(), ScriptedEngine()
    await runner.start(lambda: engine)
    *words, last = await take(runner, "a", 99, max_new_tokens=3)
    assert [type(word) for word in words] == [Delta] * 3
    assert isinstance(last, Finished)
    await runner.stop(WAIT_S)
    # Nobody cancels what has ended by itself.
    assert engine.cancelled == []


async def test_a_reader_that_stops_loses_its_stream_and_nobody_else_does() -> None:
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
        with pytest.raises(Aborted, match="stopped reading: 4 events were waiting"):
            await anext(slow)
        await step()
        let_it_go(engine)
    assert await runner.stop(WAIT_S)
    assert engine.cancelled == ["slow", "swift"]


async def test_what_a_channel_can_hold_is_read_whole_however_late() -> None:
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


async def test_the_last_event_too_ends_a_stream_whose_channel_is_full() -> None:
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


async def test_an_id_is_free_once_the_reader_that_stopped_is_gone() -> None:
    runner = EngineRunner(max_unread=2)
    engine = ScriptedEngine(permits=threading.Semaphore(0))
    await runner.start(lambda: engine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as events:
        let_it_step(engine)
        await anext(events)
        let_it_go(engine)
        await until(lambda: engine.cancelled == ["a"])
        with pytest.raises(InvalidArgument, match="under way"):
            await take(runner, "a", 1)
    *_, last = await take(runner, "a", 2, max_new_tokens=1)
    assert isinstance(last, Finished)
    await runner.stop(WAIT_S)
    assert engine.cancelled == ["a"]


async def test_an_operator_ends_the_named_requests_at_once_and_no_others() -> None:
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
        await until(lambda: runner.load == Load(running=2, waiting=1, kv_bytes_used=20))
        # One whose events are unread, one that still waits, one nobody knows, one twice.
        assert runner.abort(["a", "c", "nobody", "a"]) == ("a", "c")
        assert runner.abort(["a", "c"]) == ()
        for reading in (anext(streams["a"]), first["c"]):
            with pytest.raises(Aborted, match="the operator"):
                await reading
        assert runner.active == 1
        let_it_step(engine)
        await until(lambda: engine.cancelled == ["a", "c"])
        let_it_step(engine)
        assert isinstance(await anext(streams["b"]), Delta)
        assert runner.abort(None) == ("b",)
        with pytest.raises(Aborted, match="the operator"):
            await anext(streams["b"])
        assert runner.abort(None) == ()
        let_it_go(engine)
    await runner.stop(WAIT_S)
    assert engine.cancelled == ["a", "c", "b"]
    assert not engine.has_work


async def test_an_operator_leaves_an_answer_that_is_whole_to_its_reader() -> None:
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


async def test_the_load_is_the_engine_s_and_nothing_before_there_is_one() -> None:
    runner, engine = EngineRunner(), ScriptedEngine(max_batch=1)
    assert runner.load == Load(running=0, waiting=0, kv_bytes_used=0)
    await runner.start(lambda: engine)
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(runner.stream(request("a"))) as first,
        aclosing(runner.stream(request("b"))) as second,
    ):
        await anext(first)
        waiting = asyncio.create_task(anext(second))
        await until(lambda: runner.load == Load(running=1, waiting=1, kv_bytes_used=10))
        waiting.cancel()
        await until(lambda: runner.load == Load(running=1, waiting=0, kv_bytes_used=10))
    await until(lambda: runner.load == Load(running=0, waiting=0, kv_bytes_used=0))
    await runner.stop(WAIT_S)


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


async def test_who_vanishes_is_gone_before_the_next_step() -> None:
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
        # The thread is in a step, and has not been told; there is leave for no other.
        let_it_step(engine)
        await until(lambda: engine.cancelled == ["b"])
        assert engine.said["b"] <= said + 1
        let_it_go(engine)
    await runner.stop(WAIT_S)


async def test_a_request_left_before_the_engine_sees_it_is_not_even_checked() -> None:
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


async def test_a_flood_of_requests_does_not_keep_the_rows_from_stepping() -> None:
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


NAMES = st.sampled_from("abcd")
LENGTHS = st.one_of(st.integers(1, 6), st.sampled_from([ENDLESS, UNLUCKY, REFUSED]))
MOVES = st.one_of(
    st.tuples(st.just("submit"), NAMES, LENGTHS),
    st.tuples(st.just("read"), NAMES),
    st.tuples(st.just("leave"), NAMES),
    st.tuples(st.just("abort"), st.none() | st.sets(NAMES)),
    st.tuples(st.just("rest")),
)


# The least that a channel must hold here is a last word and the end, which come together.
@given(st.lists(MOVES, max_size=30), st.integers(2, 4))
@settings(max_examples=60)
def test_whatever_readers_and_operators_do_nothing_is_left_behind(
    moves: list[tuple[Any, ...]], max_unread: int
) -> None:
    asyncio.run(play(moves, max_unread))


async def play(moves: list[tuple[Any, ...]], max_unread: int) -> None:
    runner, engine = EngineRunner(max_unread=max_unread), ScriptedEngine(max_batch=2)
    await runner.start(lambda: engine)
    readers: dict[str, Reader] = {}
    async with asyncio.timeout(WAIT_S):
        for move in moves:
            readers = {name: reader for name, reader in readers.items() if not reader.ended}
            assert runner.active == len(readers)
            match move:
                case ("submit", name, _) if name in readers:
                    with pytest.raises(InvalidArgument, match="under way"):
                        await take(runner, name, 1)
                case ("submit", name, length):
                    readers[name] = Reader(runner, name, length)
                    await asyncio.sleep(0)
                case ("read", name) if name in readers:
                    if not await readers[name].read():
                        del readers[name]
                case ("leave", name) if name in readers:
                    await readers.pop(name).leave()
                case ("abort", names):
                    assert set(runner.abort(names)) <= readers.keys() & (names or readers.keys())
                    assert runner.abort(names) == ()
                case ("rest",):
                    await until_stepped(engine)
        for reader in readers.values():
            await reader.leave()
        assert runner.active == 0
        await until(lambda: not engine.has_work)
        # Every id is free, and every row.
        wholes = await asyncio.gather(*(take(runner, name, 2, 1) for name in "abcd"))
    assert all(isinstance(last, Finished) for _, last in wholes)
    assert await runner.stop(WAIT_S)


class Reader:
    """One stream, of which the first event is waited for in the background: that submits it."""

    def __init__(self, runner: EngineRunner, name: str, length: int) -> None:
        self._stream = runner.stream(request(name, length))
        self._first = asyncio.ensure_future(anext(self._stream))
        self._reading: asyncio.Future[Event] | None = self._first
        self._length = length
        self._words = 0

    @property
    def ended(self) -> bool:
        """Whether it failed before its first event."""
        return self._first.done() and self._first.exception() is not None

    async def read(self) -> bool:
        """Take the next event; return whether there may be more."""
        reading, self._reading = self._reading, None
        try:
            event = await (reading or anext(self._stream))
        except (Aborted, InvalidArgument, RuntimeError):
            return False
        if isinstance(event, Finished):
            assert self._words == self._length
            await self._stream.aclose()
            return False
        # The words of this very stream, all of them and in order.
        assert isinstance(event, Delta)
        assert event.token_ids == (self._words,)
        self._words += 1
        return True

    async def leave(self) -> None:
        self._first.cancel()
        await asyncio.wait({self._first})
        await self._stream.aclose()


async def until_stepped(engine: ScriptedEngine) -> None:
    """Give the thread the time for two steps, if it has any to do."""
    steps = engine.steps
    await until(lambda: engine.steps > steps + 1 or not engine.has_work)
