"""The standard health service (grpc.health.v1) of one port.

Owns what it says of the server and its services, and that its watches end at shutdown. Knows
nothing of why the server serves or not.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from grpc_health.v1 import health, health_pb2


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """The standard servicer, with an end: at shutdown its open watches end too.

    Otherwise each would hold the server for the whole of its grace.
    """

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._names = ("", *services)
        self._draining = asyncio.Event()

    async def set_all(self, *, serving: bool) -> None:
        """Set the server's status and that of each service."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """Say NOT_SERVING from now on, and end the watches."""
        await self.enter_graceful_shutdown()
        self._draining.set()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """See grpc.health.v1."""
        watch = asyncio.create_task(super().Watch(request, context))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({watch, draining}, return_when=asyncio.FIRST_COMPLETED)
            # Let the watch tell the last change before it ends.
            if draining.done():
                await asyncio.wait({watch}, timeout=0.1)
        finally:
            for task in (watch, draining):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await watch
