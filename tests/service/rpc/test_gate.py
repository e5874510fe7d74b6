"""The gate: when it admits calls, how many completions, and when it is empty."""

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf.errors import ResourceExhausted, Unavailable
from service.rpc.gate import Gate

WAIT_S = 20.0


def test_a_gate_is_closed_with_a_reason_until_it_is_opened() -> None:
    gate = Gate()
    assert gate.capacity == 0
    with pytest.raises(Unavailable, match="starting"), gate.enter():
        pass
    gate.open(2)
    assert gate.capacity == 2
    with gate.enter():
        assert gate.num_calls == 1
    gate.close("the cat wants out")
    with pytest.raises(Unavailable, match="the cat wants out"), gate.enter():
        pass
    assert gate.num_calls == 0


def test_completions_above_the_capacity_are_refused_with_the_numbers() -> None:
    gate = Gate()
    gate.open(2)
    with gate.enter(), gate.admit():
        with gate.enter(), gate.admit():
            assert (gate.num_calls, gate.admitted) == (2, 2)
            refusal = (
                "^2 completions are running or waiting, and the server takes 2; try again later$"
            )
            with gate.enter(), pytest.raises(ResourceExhausted, match=refusal), gate.admit():
                pass
            assert (gate.num_calls, gate.admitted) == (2, 2)
        with gate.enter(), gate.admit():
            assert gate.admitted == 2
    assert (gate.num_calls, gate.admitted) == (0, 0)


def test_completions_are_counted_by_how_they_end() -> None:
    gate = Gate()
    gate.open(2)
    with gate.enter(), gate.admit(), gate.enter():
        with pytest.raises(Unavailable), gate.admit():
            raise Unavailable("cut off")
        assert (gate.finished, gate.unfinished) == (0, 1)
    assert (gate.finished, gate.unfinished) == (1, 1)


def test_calls_without_a_completion_need_no_place() -> None:
    gate = Gate()
    gate.open(1)
    with gate.enter(), gate.admit(), gate.enter(), gate.enter():
        assert (gate.num_calls, gate.admitted) == (3, 1)


def test_a_running_call_can_still_be_admitted_after_the_gate_closes() -> None:
    gate = Gate()
    gate.open(1)
    with gate.enter():
        gate.close("the server is shutting down")
        with gate.admit():
            assert gate.admitted == 1


def test_a_place_is_freed_for_every_outcome() -> None:
    gate = Gate()
    gate.open(1)
    for error in (RuntimeError, asyncio.CancelledError):
        with pytest.raises(error), gate.enter(), gate.admit():
            raise error
        assert (gate.num_calls, gate.admitted) == (0, 0)


async def test_wait_until_empty_waits_for_the_last_call() -> None:
    gate = Gate()
    gate.open(1)
    async with asyncio.timeout(WAIT_S):
        await gate.wait_until_empty()
        with gate.enter():
            waiting = asyncio.create_task(gate.wait_until_empty())
            with gate.enter():
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting


@given(st.integers(1, 4), st.lists(st.sampled_from(["call", "make", "leave"])))
def test_calls_are_refused_only_at_the_capacity(capacity: int, moves: list[str]) -> None:
    gate = Gate()
    gate.open(capacity)
    inside: list[tuple[str, ExitStack]] = []
    for move in moves:
        making = sum(kind == "make" for kind, _ in inside)
        if move == "leave":
            if inside:
                inside.pop(0)[1].close()
        else:
            with ExitStack() as stack:
                stack.enter_context(gate.enter())
                if move == "make":
                    if making == capacity:
                        with pytest.raises(ResourceExhausted):
                            stack.enter_context(gate.admit())
                        continue
                    stack.enter_context(gate.admit())
                inside.append((move, stack.pop_all()))
        assert gate.num_calls == len(inside)
        assert gate.admitted == sum(kind == "make" for kind, _ in inside) <= capacity
    for _, stack in inside:
        stack.close()
    assert (gate.num_calls, gate.admitted) == (0, 0)
