"""Decides whether calls are admitted, and counts those under way.

Owns that decision, so draining has two steps: close the gate, then wait until it is empty. Also
owns the limit on completions under way, so that a call above it is refused before it costs any
work. Knows nothing of what a call does.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from a2sf.errors import ResourceExhausted, Unavailable


class Gate:
    """Counts the calls under way, and the completions among them. Closed until opened."""

    def __init__(self) -> None:
        self._closed_because: str | None = "the server is starting"
        self._num_calls = 0
        self._admitted = 0
        self._capacity = 0
        self._finished = 0
        self._unfinished = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_calls(self) -> int:
        """Calls under way, of any kind."""
        return self._num_calls

    @property
    def admitted(self) -> int:
        """Completions under way, which are part of `num_calls`."""
        return self._admitted

    @property
    def capacity(self) -> int:
        """The most completions under way at a time; 0 until the gate is first opened."""
        return self._capacity

    @property
    def finished(self) -> int:
        """Completions that have ended without an error, since the start."""
        return self._finished

    @property
    def unfinished(self) -> int:
        """Completions that have ended otherwise since the start: by client, server or error."""
        return self._unfinished

    def open(self, capacity: int) -> None:
        """Admit calls, and at most `capacity` completions at a time: rows plus waiting requests.

        If more are under way, they continue; no new one is admitted until enough have finished.
        """
        assert capacity > 0, "an engine has a row at least"
        self._capacity = capacity
        self._closed_because = None

    def close(self, because: str) -> None:
        """Admit no more calls; those under way continue."""
        self._closed_because = because

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a call for the length of the block. Raises Unavailable while closed."""
        if self._closed_because is not None:
            raise Unavailable(self._closed_because)
        self._num_calls += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._empty.set()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a completion's place for the length of the block. Use it inside `enter`.

        Raises ResourceExhausted if all places are taken. Call it before any work on the request, so
        that a refused request costs nothing.
        """
        if self._admitted >= self._capacity:
            raise ResourceExhausted(
                f"{self._admitted} completions are running or waiting, and the server takes "
                f"{self._capacity}; try again later"
            )
        self._admitted += 1
        try:
            yield
        except BaseException:
            self._unfinished += 1
            raise
        else:
            self._finished += 1
        finally:
            self._admitted -= 1

    async def wait_until_empty(self) -> None:
        """Wait until no call is under way."""
        await self._empty.wait()
