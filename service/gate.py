"""The gate in front of all handlers: whether calls are taken, and how many are inside.

Owns that one decision, so that draining is two steps: close the gate, wait until it is empty.
Knows nothing of what a call does.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from a2sf.errors import Unavailable


class Gate:
    """Counts the calls inside; closed until opened."""

    def __init__(self) -> None:
        self._closed_because: str | None = "the server is starting"
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """Calls inside."""
        return self._inside

    def open(self) -> None:
        """Take calls."""
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

    async def emptied(self) -> None:
        """Wait until no call is inside."""
        await self._empty.wait()
