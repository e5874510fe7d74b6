"""Random moves of readers and operators against the engine's thread leave no state."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2sf.errors import Aborted, InvalidArgument
from a2sf.requests import Delta, Event, Finished
from service.backend.runner import EngineRunner, RequestFailed
from tests.service.conftest import WAIT_S, until
from tests.service.scripted import (
    ENDLESS,
    REFUSED,
    UNLUCKY,
    ScriptedEngine,
    request,
    take,
)

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
def test_no_state_remains_after_any_moves_of_readers_and_operators(
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
                    with pytest.raises(InvalidArgument, match="running request"):
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
        except (Aborted, InvalidArgument, RequestFailed):
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
