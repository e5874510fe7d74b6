"""Adapts Ray's call context to the gRPC context that the servicers expect.

Owns the few methods of a gRPC context that they use, and passing on the messages that they write.
A failed call sets its status in Ray's context and returns an empty message: if a handler raises,
Ray loses the trailing metadata, and so the details. `service.ray_serve.proxy` drops that message.
Knows nothing of what calls do.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import Message


class RayContext(Protocol):
    """The part of `ray.serve.grpc_util.RayServegRPCContext` that is used."""

    def invocation_metadata(self) -> list[tuple[str, str]]: ...  # noqa: D102

    def set_code(self, code: grpc.StatusCode) -> None: ...  # noqa: D102

    def set_details(self, details: str) -> None: ...  # noqa: D102

    def set_trailing_metadata(  # noqa: D102
        self, trailing_metadata: list[tuple[str, str]]
    ) -> None: ...


class Ended(Exception):
    """The call's status is set; `abort` raises this to leave the handler."""


class CallContext:
    """A partial `grpc.aio.ServicerContext`: only what `call_scope` and writers use."""

    def __init__(self, context: RayContext) -> None:
        self._context = context
        self._written: asyncio.Queue[Message | None] = asyncio.Queue()

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """Metadata from the client."""
        return self._context.invocation_metadata()

    def time_remaining(self) -> None:
        """Always None: Ray does not pass on the client's deadline; it cancels when it passes."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Iterable[tuple[str, Any]] = (),
    ) -> NoReturn:
        """Set the status and raise Ended."""
        self._context.set_code(code)
        self._context.set_details(details)
        self._context.set_trailing_metadata(list(trailing_metadata))
        raise Ended

    async def write(self, message: Message) -> None:
        """Pass one message of the stream to the reader of `messages`."""
        self._written.put_nowait(message)

    async def messages(
        self, handler: Coroutine[Any, Any, None], empty: Message
    ) -> AsyncGenerator[Message, None]:
        """Run `handler` and yield what it writes, then `empty` if it ended with a status.

        If the reader leaves early, also by cancellation, cancel the handler and wait until it ends.
        """
        handling = asyncio.create_task(handler)
        handling.add_done_callback(lambda _: self._written.put_nowait(None))
        try:
            while (message := await self._written.get()) is not None:
                yield message
            try:
                handling.result()
            except Ended:
                yield empty
        finally:
            handling.cancel()
            await asyncio.wait({handling})
