"""Aborts a stream that its client does not read.

Owns the time limit for sending an event, with one timer per stream. A timeout around every write,
set and cancelled for each token, took a sixth of the cost of a token. Knows nothing of what is
written.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from a2sf.errors import Aborted


@asynccontextmanager
async def stream_writer(
    context: grpc.aio.ServicerContext[Any, Any], limit_s: float
) -> "AsyncIterator[StreamWriter]":
    """Yield a writer of the stream's messages.

    Raises Aborted from the block as soon as one write has taken `limit_s` seconds.
    """
    try:
        async with asyncio.timeout(None) as end:
            writer = StreamWriter(context, limit_s, end)
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


class StreamWriter:
    """Writes messages, and makes `end` expire if one write takes too long."""

    def __init__(
        self, context: grpc.aio.ServicerContext[Any, Any], limit_s: float, end: asyncio.Timeout
    ) -> None:
        self._context = context
        self._limit_s = limit_s
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        """Time when the current write began; None between writes."""
        self._timer = self._loop.call_later(limit_s, self._check)

    async def write(self, message: Any) -> None:
        """Write one message; returns once gRPC has accepted it."""
        self._began = self._loop.time()
        await self._context.write(message)
        self._began = None

    def close(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        due = (now if self._began is None else self._began) + self._limit_s
        if due <= now:
            self._end.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._check)
