"""Ending a stream that its client does not read.

Owns how long an event may take to be sent, and the one timer a stream that watches over it: a
timeout around every write, set and taken back for each token, took a sixth of what a token costs.
Knows nothing of what is written.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from a2sf.errors import Aborted


@asynccontextmanager
async def writing(
    context: grpc.aio.ServicerContext[Any, Any], limit_s: float
) -> "AsyncIterator[Writer]":
    """Yield what writes a stream's messages to the client.

    The block ends with Aborted as soon as one write has taken `limit_s` seconds.
    """
    try:
        async with asyncio.timeout(None) as end:
            writer = Writer(context, limit_s, end)
            try:
                yield writer
            finally:
                writer.close()
    except TimeoutError:
        if not end.expired():
            raise
        raise Aborted(
            f"the client has stopped reading: an event could not be sent for {limit_s:g} s"
        ) from None


class Writer:
    """Writes messages, and has `end` expire when one takes too long."""

    def __init__(
        self, context: grpc.aio.ServicerContext[Any, Any], limit_s: float, end: asyncio.Timeout
    ) -> None:
        self._context = context
        self._limit_s = limit_s
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        """When the write under way began; None between two."""
        self._timer = self._loop.call_later(limit_s, self._look)

    async def write(self, message: Any) -> None:
        """Write one message; returns once gRPC has taken it."""
        self._began = self._loop.time()
        await self._context.write(message)
        self._began = None

    def close(self) -> None:
        """Watch no more."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._began is None else self._began) + self._limit_s
        if due <= now:
            self._end.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)
