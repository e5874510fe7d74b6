"""A call that came by Ray, as the servicers see calls.

Owns the few methods that they ask of a gRPC context, and the way back of what they write. A
failure's status leaves in Ray's own context, beside an empty message: Ray loses the trailing
metadata, and so the details, of whatever raises. `service.ray_serve.proxy` drops that message.
Knows nothing of what calls ask.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import Message


class RayContext(Protocol):
    """What is used of `ray.serve.grpc_util.RayServegRPCContext`."""

    def invocation_metadata(self) -> list[tuple[str, str]]: ...  # noqa: D102

    def set_code(self, code: grpc.StatusCode) -> None: ...  # noqa: D102

    def set_details(self, details: str) -> None: ...  # noqa: D102

    def set_trailing_metadata(  # noqa: D102
        self, trailing_metadata: list[tuple[str, str]]
    ) -> None: ...


class Ended(Exception):
    """The call has its status; what `abort` raises to leave the handler."""


class CallContext:
    """Stands for a `grpc.aio.ServicerContext`, of which it has what `answering` and writers use."""

    def __init__(self, context: RayContext) -> None:
        self._context = context
        self._written: asyncio.Queue[Message | None] = asyncio.Queue()

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """The metadata that the client sent."""
        return self._context.invocation_metadata()

    def time_remaining(self) -> None:
        """None, always: Ray does not hand the client's deadline on, and cancels when it passes."""

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
        """Hand one message of the stream to whoever iterates `messages`."""
        self._written.put_nowait(message)

    async def messages(
        self, handler: Coroutine[Any, Any, None], empty: Message
    ) -> AsyncGenerator[Message, None]:
        """Run `handler` and yield what it writes, then `empty` if it ended with a status.

        Whoever leaves early, by cancellation too, ends the handler, and leaves when it has ended.
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
