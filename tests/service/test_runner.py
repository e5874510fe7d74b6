"""The engine's thread: order, early leaving, and what its death means to those who wait."""

import asyncio
import threading
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from a2sf.errors import InvalidArgument, Unavailable
from a2sf.requests import Delta, Event, GenerationRequest
from service.runner import EngineCrashed, EngineRunner

WAIT_S = 20.0


@dataclass
class ScriptedEngine:
    """Says a word a step to each request, without end, and notes what it is told."""

    running: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    break_with: BaseException | None = None

    @property
    def engine(self) -> "ScriptedEngine":
        return self

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, request: GenerationRequest) -> None:
        self.threads.add(threading.get_ident())
        if request.max_new_tokens == 13:
            raise RuntimeError("unlucky")
        if request.max_new_tokens == 14:
            raise InvalidArgument("max_new_tokens", "14")
        self.running.append(request.request_id)

    def cancel(self, request_id: str) -> None:
        self.threads.add(threading.get_ident())
        self.cancelled.append(request_id)
        self.running = [name for name in self.running if name != request_id]

    def step(self) -> list[Event]:
        self.threads.add(threading.get_ident())
        if self.break_with is not None:
            raise self.break_with
        return [Delta(request_id=name, text="word", token_ids=(1,)) for name in self.running]


def request(name: str, max_new_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_ids=(1,), max_new_tokens=max_new_tokens)


async def take(runner: EngineRunner, name: str, count: int, max_new_tokens: int = 5) -> int:
    """Read `count` events and leave."""
    taken = 0
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(runner.stream(request(name, max_new_tokens))) as events,
    ):
        async for _ in events:
            taken += 1
            if taken == count:
                break
    return taken


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
    assert engine.running == []


async def test_an_id_under_way_is_refused() -> None:
    runner = EngineRunner()
    await runner.start(ScriptedEngine)
    async with asyncio.timeout(WAIT_S), aclosing(runner.stream(request("a"))) as first:
        await anext(first)
        with pytest.raises(InvalidArgument, match="request_id"):
            await take(runner, "a", 1)
        await anext(first)
    await runner.stop(WAIT_S)


@pytest.mark.parametrize(("tokens", "error"), [(13, RuntimeError), (14, InvalidArgument)])
async def test_a_refused_request_fails_alone(tokens: int, error: type[Exception]) -> None:
    runner = EngineRunner()
    await runner.start(ScriptedEngine)
    with pytest.raises(error):
        await take(runner, "bad", 1, max_new_tokens=tokens)
    assert await take(runner, "good", 2) == 2
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
