"""Making calls: a channel, a deadline on every call, errors of the project's own tree.

Owns the one way in which a call is made, by asyncio and by threads, and cancelling a stream that
is left early (gRPC does not: the server would work on for nobody). Knows nothing of what is asked.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from service.client.calls import Call
from service.client.channel import PLAIN_TEXT, ChannelOptions, open_aio, open_sync
from service.status import Cancelled, from_wire

T = TypeVar("T")


class _Starter:
    """Starts calls on one channel of either kind, with the token."""

    def __init__(
        self, channel: grpc.Channel | grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self._channel = channel
        self._metadata = metadata
        self._stubs: dict[type, Any] = {}

    def start(self, call: Call[Any], timeout_s: float) -> Any:
        if call.stub not in self._stubs:
            self._stubs[call.stub] = call.stub(self._channel)
        method = getattr(self._stubs[call.stub], call.method)
        return method(call.request, timeout=timeout_s, metadata=self._metadata)


class AsyncTransport:
    """A channel of the running event loop; make it inside one."""

    def __init__(self, target: str, options: ChannelOptions = PLAIN_TEXT) -> None:
        metadata = options.metadata(target)
        self._channel = open_aio(target, options)
        self._start = _Starter(self._channel, metadata).start

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way end as Cancelled."""
        await self._channel.close(None)

    async def unary(self, call: Call[T], timeout_s: float) -> T:
        """Make a call that has one answer."""
        with _own_errors(timeout_s):
            answer = await self._start(call, timeout_s)
        return call.read(answer)

    async def stream(self, call: Call[T | None], timeout_s: float) -> AsyncGenerator[T, None]:
        """Make a call whose answer comes in events, and yield those that were read as one."""
        rpc = self._start(call, timeout_s)
        try:
            with _own_errors(timeout_s):
                async for message in rpc:
                    event = call.read(message)
                    if event is not None:
                        yield event
        finally:
            rpc.cancel()


class SyncTransport:
    """A channel for threads; any number of them may share it."""

    def __init__(self, target: str, options: ChannelOptions = PLAIN_TEXT) -> None:
        metadata = options.metadata(target)
        self._channel = open_sync(target, options)
        self._start = _Starter(self._channel, metadata).start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way end as Cancelled."""
        self._channel.close()

    def unary(self, call: Call[T], timeout_s: float) -> T:
        """Make a call that has one answer."""
        with _own_errors(timeout_s):
            answer = self._start(call, timeout_s)
        return call.read(answer)

    def stream(self, call: Call[T | None], timeout_s: float) -> Generator[T, None, None]:
        """Make a call whose answer comes in events, and yield those that were read as one."""
        rpc = self._start(call, timeout_s)
        try:
            with _own_errors(timeout_s):
                for message in rpc:
                    event = call.read(message)
                    if event is not None:
                        yield event
        finally:
            rpc.cancel()


@contextmanager
def _own_errors(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_wire(error, timeout_s) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled the caller: the channel was closed under the call.
        raise Cancelled("the channel was closed", grpc.StatusCode.CANCELLED) from None
