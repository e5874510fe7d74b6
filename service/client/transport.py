"""Makes calls: a channel, a deadline for every call, and the project's own errors.

Owns how calls are made, with asyncio and with threads: it repeats a call that finds no room or no
server, while nothing of its answer has arrived, and cancels a stream that is left early (gRPC does
not, so the server would continue without a reader). Knows nothing of what calls ask.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import grpc

from a2sf.errors import A2SFError, Unavailable
from service.client.calls import Call
from service.client.channel import PLAIN_TEXT, ChannelOptions, open_aio, open_sync
from service.client.rounds import Rounds
from service.client.targets import may_be_several
from service.status import DETAILS_KEY, Cancelled, NoRoom, from_wire

T = TypeVar("T")


class _Calls:
    """Starts calls on a channel of either kind, with the token, and converts their errors."""

    def __init__(
        self,
        channel: grpc.Channel | grpc.aio.Channel,
        metadata: tuple[tuple[str, str], ...],
        target: str,
        options: ChannelOptions,
    ) -> None:
        self._channel = channel
        self._metadata = metadata
        self._target = target
        self._encryption = "plain text" if options.tls is None else "TLS"
        self._several = may_be_several(target)
        self._stubs: dict[type, Any] = {}
        self._closed = False
        # A stub created on a closed channel for threads crashes the interpreter.
        self._lock = threading.Lock()

    def start(self, call: Call[Any], timeout_s: float) -> Any:
        with self._lock:
            if self._closed:
                raise _closed()
            if call.stub not in self._stubs:
                self._stubs[call.stub] = call.stub(self._channel)
        method = getattr(self._stubs[call.stub], call.method)
        try:
            return method(call.request, timeout=timeout_s, metadata=self._metadata)
        except (ValueError, grpc.aio.UsageError):
            # Both kinds of channel raise these if the channel has been closed since.
            if not self._closed:
                raise
            raise _closed() from None

    def rounds(self, call: Call[Any], timeout_s: float) -> Rounds:
        return Rounds(timeout_s, several=self._several, after_unavailable=not call.changes_server)

    def close(self) -> None:
        """Refuse new calls; call it before closing the channel."""
        with self._lock:
            self._closed = True

    @contextmanager
    def converted_errors(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._convert(error, timeout_s) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # The caller was not cancelled: the channel was closed during the call.
            raise _closed() from None

    def _convert(self, error: grpc.RpcError, timeout_s: float) -> A2SFError:
        converted = from_wire(error, timeout_s)
        # At runtime, every error of a call is also a call; its static type does not say so.
        call: Any = error
        if isinstance(converted, Unavailable) and DETAILS_KEY not in dict(
            call.trailing_metadata() or ()
        ):
            # The error is gRPC's own, not the server's, and does not say what to do.
            return Unavailable(
                f"connection to {self._target} failed: {converted}; check that a server "
                f"is running there and uses {self._encryption}, as this client does"
            )
        return converted


def _closed() -> Cancelled:
    return Cancelled("the channel was closed", grpc.StatusCode.CANCELLED)


class AsyncTransport:
    """A channel of the running event loop; create it inside the loop."""

    _balanced: ClassVar[bool] = True
    """Whether any of several servers may answer."""

    def __init__(self, target: str, options: ChannelOptions = PLAIN_TEXT) -> None:
        metadata = options.metadata(target)
        self._channel = open_aio(target, options, balanced=self._balanced)
        self._calls = _Calls(self._channel, metadata, target, options)

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
        """Close the channel; current and later calls end as Cancelled."""
        self._calls.close()
        await self._channel.close(None)

    async def unary(self, call: Call[T], timeout_s: float) -> T:
        """Make a call with one response."""
        rounds = self._calls.rounds(call, timeout_s)
        while True:
            try:
                with self._calls.converted_errors(timeout_s):
                    answer = await self._calls.start(call, rounds.left_s)
                return call.read(answer)
            except (NoRoom, Unavailable) as error:
                wait_s = rounds.wait_s(error)
            await asyncio.sleep(wait_s)

    async def stream(self, call: Call[T | None], timeout_s: float) -> AsyncGenerator[T, None]:
        """Make a call with a stream of events; yield those that `call.read` converts."""
        rounds, started = self._calls.rounds(call, timeout_s), False
        while True:
            rpc = self._calls.start(call, rounds.left_s)
            try:
                with self._calls.converted_errors(timeout_s):
                    async for message in rpc:
                        started = True
                        event = call.read(message)
                        if event is not None:
                            yield event
            except (NoRoom, Unavailable) as error:
                if started:
                    raise
                wait_s = rounds.wait_s(error)
            else:
                return
            finally:
                rpc.cancel()
            await asyncio.sleep(wait_s)


class SyncTransport:
    """A channel for threads; any number of them may share it."""

    _balanced: ClassVar[bool] = True

    def __init__(self, target: str, options: ChannelOptions = PLAIN_TEXT) -> None:
        metadata = options.metadata(target)
        self._channel = open_sync(target, options, balanced=self._balanced)
        self._calls = _Calls(self._channel, metadata, target, options)

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
        """Close the channel; current and later calls end as Cancelled."""
        self._calls.close()
        self._channel.close()

    def unary(self, call: Call[T], timeout_s: float) -> T:
        """Make a call with one response."""
        rounds = self._calls.rounds(call, timeout_s)
        while True:
            try:
                with self._calls.converted_errors(timeout_s):
                    answer = self._calls.start(call, rounds.left_s)
                return call.read(answer)
            except (NoRoom, Unavailable) as error:
                wait_s = rounds.wait_s(error)
            time.sleep(wait_s)

    def stream(self, call: Call[T | None], timeout_s: float) -> Generator[T, None, None]:
        """Make a call with a stream of events; yield those that `call.read` converts."""
        rounds, started = self._calls.rounds(call, timeout_s), False
        while True:
            rpc = self._calls.start(call, rounds.left_s)
            try:
                with self._calls.converted_errors(timeout_s):
                    for message in rpc:
                        started = True
                        event = call.read(message)
                        if event is not None:
                            yield event
            except (NoRoom, Unavailable) as error:
                if started:
                    raise
                wait_s = rounds.wait_s(error)
            else:
                return
            finally:
                rpc.cancel()
            time.sleep(wait_s)
