"""The gate in front of all handlers: whether calls are taken, and how many are inside.

Owns that one decision, so that draining is two steps: close the gate, wait until it is empty; and
the bound on completions under way, so that a call too many is refused before it costs anything.
Knows nothing of what a call does.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from a2sf.errors import ResourceExhausted, Unavailable


class Gate:
    """Counts the calls inside, and those of them that make completions; closed until opened."""

    def __init__(self) -> None:
        self._closed_because: str | None = "the server is starting"
        self._inside = 0
        self._admitted = 0
        self._capacity = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """Calls inside, of any kind."""
        return self._inside

    @property
    def admitted(self) -> int:
        """Completions under way: those of the calls inside that were admitted to make one."""
        return self._admitted

    @property
    def capacity(self) -> int:
        """Completions that may be under way; 0 until the gate is opened for the first time."""
        return self._capacity

    def open(self, capacity: int) -> None:
        """Take calls, of which `capacity` may make completions at a time: rows and waiting places.

        With fewer than are admitted by now, none is ended; none is admitted until enough have left.
        """
        assert capacity > 0, "an engine has a row at least"
        self._capacity = capacity
        self._closed_because = None

    def close(self, because: str) -> None:
        """Take no more calls; those inside stay."""
        self._closed_because = because

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside for the length of the block. Raises Unavailable while closed."""
        if self._closed_because is not None:
            raise Unavailable(self._closed_because)
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if self._inside == 0:
                self._empty.set()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place for a completion for the length of the block, which is one inside `enter`.

        Raises ResourceExhausted when all are taken. Comes before all work on the request: whoever
        is refused has cost nothing.
        """
        if self._admitted >= self._capacity:
            raise ResourceExhausted(
                f"{self._admitted} of at most {self._capacity} completions are under way; "
                "try again later"
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def emptied(self) -> None:
        """Wait until no call is inside."""
        await self._empty.wait()
