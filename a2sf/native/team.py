"""The threads that run kernels.

Owns the team: the thread that calls a kernel, and helpers. The caller starts at once and helpers
join it, so it never waits for a helper that has not begun: on busy cores it does the work alone.
Between calls, helpers look for the next one for a short time, because a decode step makes hundreds
of calls with short gaps; then they sleep. Knows nothing of what the kernels compute.

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
from numba import carray

from a2sf.native import compiling, memory
from a2sf.native.memory import add, call, compare_and_swap, keep_bits, load, longs_at

_LOOKS = 200
"""How often a helper looks for the next call before it sleeps. Each look yields the processor,
which takes about half a microsecond where nothing else wants it."""

_JOIN_S = 1.0

# Indices of the numbers that all threads share. Those that change often have a cache line each.
_WORK, _SLEEPERS, _PROGRAM, _DATA, _HELPERS, _END, _SEMAPHORE, _YIELD, _WAIT, _POST = (
    *(0, 8),
    *range(16, 24),
)
_NUMBERS = 32

# The number at _WORK counts the helpers at work, above this bit, and the free places, below.
_ONE_AT_WORK = 1 << 32
_PLACES = _ONE_AT_WORK - 1


class Team:
    """Helpers, and what they share with the caller. Safe to use from several threads."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        library.calloc.restype = ctypes.c_void_p
        # Never freed, because helpers may look at it until the process ends.
        self._address: int = library.calloc(_NUMBERS + 8, 8)
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
        """Run a kernel; see `run`."""
        if threads == 1 or not self._in_use.acquire(blocking=False):
            _function(program)(data)
            return
        try:
            while len(self._helpers) < threads - 1:
                self._add_helper()
            self._shared[_PROGRAM], self._shared[_DATA] = program, data
            self._shared[_HELPERS] = threads - 1
            self._lead(self._address)
        finally:
            self._in_use.release()

    def end(self) -> None:
        """End the helpers. Their code must not be unloaded while they run."""
        with self._in_use:
            self._shared[_END] = 1
            for _ in self._helpers:
                _function(self._shared[_POST])(self._shared[_SEMAPHORE])
            for helper in self._helpers:
                helper.join(_JOIN_S)

    def _add_helper(self) -> None:
        name = f"a2sf-kernel-{len(self._helpers) + 1}"
        helper = threading.Thread(target=self._help, args=(self._address,), name=name, daemon=True)
        helper.start()
        self._helpers.append(helper)


@cache
def _team() -> Team:
    team = Team()
    atexit.register(team.end)
    return team


def _forget() -> None:
    """Make a new team in a forked process, which has no helpers."""
    if _team.cache_info().currsize:
        atexit.unregister(_team().end)
        _team.cache_clear()


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


def _lead(data):
    """Offer places, do the work, close the places, and wait for the helpers who took one."""
    shared = carray(data, _NUMBERS, np.int64)
    work = longs_at(shared.ctypes.data + 8 * _WORK)
    sleepers = longs_at(shared.ctypes.data + 8 * _SLEEPERS)
    add(work, shared[_HELPERS])
    for _ in range(min(load(sleepers), shared[_HELPERS])):
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
            if compare_and_swap(work, seen, seen - 1 + _ONE_AT_WORK):
                call(shared[_PROGRAM], shared[_DATA])
                add(work, -_ONE_AT_WORK)
        elif looks < _LOOKS:
            looks += 1
            call(shared[_YIELD], 0)
        else:
            looks = 0
            # The caller reads the sleepers after it has offered places. So it sees this one, or
            # this one sees the places.
            add(sleepers, 1)
            if not load(work) & _PLACES and not load(end):
                call(shared[_WAIT], shared[_SEMAPHORE])
            add(sleepers, -1)
