"""Kernels run in several threads, next to Python's threads, and whether or not helpers come."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numba import carray

from a2sf.native import compiling, memory, team
from a2sf.native.memory import add, load, longs_at

PARTS = 1000

# The kernels' arguments: the counter of parts taken, the sum of the parts, threads that came, and a
# number that the test sets.
TAKEN, SUM, CAME, GATE = range(4)


def sum_up(data):  # type: ignore[no-untyped-def]
    """Add the numbers of all parts."""
    at = carray(data, 4, np.int64).ctypes.data
    add(longs_at(at + 16), 1)
    part = add(longs_at(at), 1)
    while part < PARTS:
        add(longs_at(at + 8), part)
        part = add(longs_at(at), 1)


def meet(data):  # type: ignore[no-untyped-def]
    """Wait until as many threads came as the gate says."""
    at = carray(data, 4, np.int64).ctypes.data
    add(longs_at(at + 16), 1)
    while load(longs_at(at + 16)) < load(longs_at(at + 24)):
        pass


def wait(data):  # type: ignore[no-untyped-def]
    """Wait until the gate opens."""
    at = carray(data, 4, np.int64).ctypes.data
    add(longs_at(at + 16), 1)
    while load(longs_at(at + 24)) == 0:
        pass


def kernel(function: Callable[..., None]) -> int:
    return compiling.compiled(function, uses=[memory])


def run(function: Callable[..., None], threads: int, gate: int = 0) -> list[int]:
    numbers = (ctypes.c_int64 * 4)(0, 0, 0, gate)
    team.run(kernel(function), ctypes.addressof(numbers), threads)
    return list(numbers)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_part_is_done_once_and_before_the_call_returns(threads: int) -> None:
    for _ in range(200):
        numbers = run(sum_up, threads)
        assert numbers[SUM] == PARTS * (PARTS - 1) // 2
        assert 1 <= numbers[CAME] <= threads


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_helpers_come_also_after_they_slept(pause: float) -> None:
    run(meet, 3, gate=3)
    time.sleep(pause)
    # It would hang if two helpers did not come.
    assert run(meet, 3, gate=3)[CAME] == 3


def test_another_thread_s_call_during_a_call_is_done_alone() -> None:
    numbers = (ctypes.c_int64 * 4)()
    program = kernel(wait)
    calling = threading.Thread(target=team.run, args=(program, ctypes.addressof(numbers), 2))
    calling.start()
    # Other Python threads run while a kernel runs.
    while numbers[CAME] == 0:
        pass
    assert run(sum_up, 2)[CAME] == 1
    numbers[GATE] = 1
    calling.join()


def test_without_more_threads_the_caller_does_the_work_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    mine = team.Team()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    numbers = (ctypes.c_int64 * 4)()
    mine.run(kernel(sum_up), ctypes.addressof(numbers), 3)
    assert list(numbers) == [PARTS + 1, PARTS * (PARTS - 1) // 2, 1, 0]


def test_a_kernel_that_hangs_does_not_keep_a_process_alive() -> None:
    code = (
        "import threading, tests.a2sf.native.test_team as t;"
        "t.run(t.meet, 2, gate=2);"
        "threading.Thread(target=t.run, args=(t.wait, 2), daemon=True).start()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_process_does_the_work_alone() -> None:
    assert run(meet, 2, gate=2)[CAME] == 2
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, b"%d" % run(sum_up, 2)[SUM])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert answer.read() == str(PARTS * (PARTS - 1) // 2)
    os.waitpid(child, 0)


def test_a_process_ends_quietly_while_helpers_look_for_work() -> None:
    code = "from tests.a2sf.native.test_team import meet, run; print(run(meet, 3, gate=3)[2])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
