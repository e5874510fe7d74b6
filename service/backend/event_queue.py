"""The events of one stream on their way from the engine's thread to the reader.

Owns their order, and how a failure reaches the reader. Use it only in the event loop. Knows nothing
of the engine, or of how many events may wait.
"""

import asyncio
from collections import deque

from a2sf.requests import Event, Finished


class EventQueue:
    """Events of one stream on the way to its reader. Use it only in the event loop."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.open = True
        """Whether more events may come: the stream has not ended or failed, and has a reader."""
        self._unread: deque[Event] = deque()
        self._failure: Exception | None = None
        self._arrived = asyncio.Event()

    @property
    def unread(self) -> int:
        """Events that the reader has not taken."""
        return len(self._unread)

    def put(self, event: Event) -> None:
        """Add an event; `Finished` must be the last."""
        self._unread.append(event)
        self.open = not isinstance(event, Finished)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Make the reader's next `get` raise `error`, and drop unread events."""
        self.open = False
        self._failure = error
        self._unread.clear()
        self._arrived.set()

    async def get(self) -> Event:
        """Wait for the next event; raise the failure if there is one."""
        await self._arrived.wait()
        if self._failure is not None:
            raise self._failure
        event = self._unread.popleft()
        if not self._unread:
            self._arrived.clear()
        return event
