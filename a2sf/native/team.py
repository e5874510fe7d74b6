"""The threads that run kernels.

Owns the team: the thread that calls a kernel, and helpers. The caller wakes helpers that sleep and
begins to work. Helpers join it when they get a core; the caller waits at the end only for those who
joined, so on busy cores it does the work alone. After a call, helpers look for the next one for a
short time, because a decode step makes hundreds of calls with short gaps; then they sleep. Knows
nothing of what the kernels compute.

A kernel must divide its work itself: every thread takes the next part until none is left.
"""

# numba infers types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import atexit
import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import carray, njit

from a2sf.native import compiling, memory
from a2sf.native.memory import add, call, compare_and_swap, keep_bits, load, longs_at

_LOOKS = 200
"""How often a helper looks for the next call before it sleeps. Each look yields the processor,
which takes about half a microsecond where nothing else wants it."""

_LONGEST_END_S = 1.0
"""How long the end of the process waits for a kernel that still runs, and for each helper."""

_LINE_BYTES = 64

# Indices of the int64 numbers that all threads share. The first three change while others read
# them, so each has a cache line.
_WORK, _SLEEPERS, _END = 0, 8, 16
_PROGRAM, _DATA, _WANTED, _SEMAPHORE, _YIELD, _WAIT, _POST = range(24, 31)
_NUMBERS = 32

# The number at _WORK holds two counts: in the upper 32 bits the helpers that have joined, in the
# lower 32 bits the places that are still free.
_ONE_JOINED = 1 << 32
_PLACES = _ONE_JOINED - 1


class Team:
    """Helpers, and what they share with the caller. Safe to use from several threads."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        library.calloc.restype = ctypes.c_void_p
        # Never freed, because helpers may look at it until the process ends.
        memory_at = library.calloc(_NUMBERS + 16, 8)
        self._address: int = -(-memory_at // _LINE_BYTES) * _LINE_BYTES
        self._shared = (ctypes.c_int64 * _NUMBERS).from_address(self._address)
        semaphore = self._address + 8 * _NUMBERS
        library.sem_init(ctypes.c_void_p(semaphore), 0, 0)
        self._shared[_SEMAPHORE] = semaphore
        for index, function in (
            (_YIELD, library.sched_yield),
            (_WAIT, library.sem_wait),
            (_POST, library.sem_post),
        ):
            self._shared[index] = ctypes.cast(function, ctypes.c_void_p).value or 0
        self._lead = _function(compiling.compiled(_lead, uses=[memory]))
        self._help = _function(compiling.compiled(_help, uses=[memory]))
        self._in_use = threading.Lock()
        self._helpers: list[threading.Thread] = []

    def run(self, program: int, data: int, threads: int) -> None:
        """Do what the function `run` of this module says."""
        if threads == 1 or not self._in_use.acquire(blocking=False):
            _function(program)(data)
            return
        try:
            self._add_helpers(threads - 1)
            self._shared[_PROGRAM], self._shared[_DATA] = program, data
            self._shared[_WANTED] = min(threads - 1, len(self._helpers))
            self._lead(self._address)
        finally:
            self._in_use.release()

    def end(self) -> None:
        """End the helpers before Python unloads their code; do not wait for a kernel that hangs."""
        if not self._in_use.acquire(timeout=_LONGEST_END_S):
            return
        self._shared[_END] = 1
        for _ in self._helpers:
            _function(self._shared[_POST])(self._shared[_SEMAPHORE])
        for helper in self._helpers:
            helper.join(_LONGEST_END_S)
        self._in_use.release()

    def _add_helpers(self, wanted: int) -> None:
        """Start helpers until there are `wanted`, or as many as the system allows."""
        while len(self._helpers) < wanted:
            name = f"a2sf-kernel-{len(self._helpers) + 1}"
            helper = threading.Thread(
                target=self._help, args=(self._address,), name=name, daemon=True
            )
            try:
                helper.start()
            except RuntimeError:  # the limit on threads is reached
                return
            self._helpers.append(helper)


_teams: list[Team] = []
"""The team of this process; empty before the first call."""

_making = threading.Lock()


def _team() -> Team:
    if not _teams:
        with _making:
            if not _teams:
                team = Team()
                atexit.register(team.end)
                _teams.append(team)
    return _teams[0]


def _forget() -> None:
    """Make a new team in a forked process, which has no helpers."""
    global _making
    _making = threading.Lock()
    for team in _teams:
        atexit.unregister(team.end)
    _teams.clear()


os.register_at_fork(after_in_child=_forget)


def run(program: int, data: int, threads: int) -> None:
    """Run a kernel in up to `threads` threads, including this one, without holding the GIL.

    Returns when all of its work is done. If another thread is using the helpers, this one does the
    work alone.

    Args:
        program: the address of the kernel, from `compiling.compiled`.
        data: the address of its arguments, for all threads.
        threads: at least 1.
    """
    _team().run(program, data, threads)


@cache
def _function(address: int) -> Callable[[int], None]:
    """The C function at an address."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@njit
def _take_one(counter):
    """Decrement a counter unless it is 0; return whether it was decremented."""
    seen = load(counter)
    while seen > 0:
        if compare_and_swap(counter, seen, seen - 1):
            return True
        seen = load(counter)
    return False


def _lead(data):
    """Offer places, do the work, close the places, and wait for the helpers that joined."""
    shared = carray(data, _NUMBERS, np.int64)
    work = longs_at(shared.ctypes.data + 8 * _WORK)
    sleepers = longs_at(shared.ctypes.data + 8 * _SLEEPERS)
    add(work, shared[_WANTED])
    for _ in range(shared[_WANTED]):
        # Each sleeper is woken once, however long it takes to get a core.
        if _take_one(sleepers):
            call(shared[_POST], shared[_SEMAPHORE])
    call(shared[_PROGRAM], shared[_DATA])
    keep_bits(work, ~_PLACES)
    while load(work):
        call(shared[_YIELD], 0)


def _help(data):
    """Take a place whenever there is one, until the end."""
    shared = carray(data, _NUMBERS, np.int64)
    work = longs_at(shared.ctypes.data + 8 * _WORK)
    sleepers = longs_at(shared.ctypes.data + 8 * _SLEEPERS)
    end = longs_at(shared.ctypes.data + 8 * _END)
    looks = 0
    while not load(end):
        seen = load(work)
        if seen & _PLACES:
            looks = 0
            if compare_and_swap(work, seen, seen - 1 + _ONE_JOINED):
                call(shared[_PROGRAM], shared[_DATA])
                add(work, -_ONE_JOINED)
        elif looks < _LOOKS:
            looks += 1
            call(shared[_YIELD], 0)
        else:
            looks = 0
            # The caller reads the sleepers after it has offered places. So it sees this one, or
            # this one sees the places.
            add(sleepers, 1)
            stay = load(work) & _PLACES or load(end)
            # If a caller has counted this helper as woken, the semaphore is or will be posted.
            if not stay or not _take_one(sleepers):
                call(shared[_WAIT], shared[_SEMAPHORE])
