"""The standard health service (grpc.health.v1) of one port.

Owns the statuses of the server and its services, and ends open watches at shutdown. Knows nothing
of why the server serves or not.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from grpc_health.v1 import health, health_pb2


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """The standard servicer, which also ends its open watches at shutdown.

    Otherwise each watch would delay the stop of the server for the whole grace period.
    """

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._names = ("", *services)
        self._ending = asyncio.Event()

    async def set_all(self, *, serving: bool) -> None:
        """Set the status of the server and of each service."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """Report NOT_SERVING from now on."""
        await self.enter_graceful_shutdown()

    def end(self) -> None:
        """End the watches. Call it when the server stops; earlier, clients would reopen them."""
        self._ending.set()

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See grpc.health.v1. The library's servicer does not implement it."""
        check = health_pb2.HealthCheckRequest
        statuses = {name: await self.Check(check(service=name), context) for name in self._names}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """See grpc.health.v1."""
        watch = asyncio.create_task(super().Watch(request, context))
        ending = asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait({watch, ending}, return_when=asyncio.FIRST_COMPLETED)
            # Let the watch send the last change before it ends.
            if ending.done():
                await asyncio.wait({watch}, timeout=0.1)
        finally:
            for task in (watch, ending):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await watch
