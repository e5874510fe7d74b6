"""Makes calls: a channel, a deadline for every call, and the project's own errors.

Owns how calls are made, with asyncio and with threads: it repeats a call that finds no room or no
server, while nothing of its answer has arrived, and cancels a stream that is left early (gRPC does
not, so the server would continue without a reader). Knows nothing of what calls ask.

gRPC's own retries are off: they would wait before trying another server, because a full server
gives a delay only for itself; and in grpcio 1.85 a call whose retry finds no server may never end,
not even at its deadline.
"""

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import grpc

from a2sf.errors import A2SFError, InvalidArgument, Unavailable
from service.client.calls import Call
from service.client.channel import (
    PLAIN_TEXT,
    ChannelOptions,
    may_be_several,
    open_aio,
    open_sync,
)
from service.status import DETAILS_KEY, Cancelled, DeadlineExceeded, NoRoom, from_wire

T = TypeVar("T")

ROUNDS = 4
"""Rounds of attempts, including the first; servers give the delay between rounds."""

MAX_TIMEOUT_S = 1e9
"""Longest deadline, about thirty years. gRPC counts nanoseconds in 64 bits, and treats a value that
does not fit, such as infinity, as a deadline in the past."""

ATTEMPTS = 4
"""Attempts that may end as Unavailable, including the first."""

FIRST_WAIT_S = 0.2
"""Delay before the second of these attempts; each later delay is twice as long. All vary by a fifth
at random, so that the calls of a server that died do not return at the same time."""

SERVERS_A_ROUND = 2
"""Servers to try per round, if there are several. With more, a call would find room a little
sooner, but full servers would have to refuse many more calls."""


class Rounds:
    """The attempts of one call, with a deadline of `timeout_s` seconds from creation."""

    def __init__(self, timeout_s: float, *, several: bool, after_unavailable: bool) -> None:
        """Start the deadline.

        `several`: whether there are other servers to try. `after_unavailable`: whether the call may
        be repeated if it is unknown what the server did.

        Raises InvalidArgument for a timeout that is too long or NaN, and DeadlineExceeded if it is
        not positive: gRPC lets such a call succeed if the server is fast.
        """
        # The comparison is written so that it refuses NaN too.
        if not timeout_s <= MAX_TIMEOUT_S:
            raise InvalidArgument("timeout_s", f"{timeout_s}; accepted: at most {MAX_TIMEOUT_S:g}")
        if timeout_s <= 0:
            raise DeadlineExceeded(
                f"DEADLINE_EXCEEDED: timeout_s is {timeout_s}", grpc.StatusCode.DEADLINE_EXCEEDED
            )
        self._deadline = time.monotonic() + timeout_s
        self._servers = SERVERS_A_ROUND if several else 1
        self._after_unavailable = after_unavailable
        self._refusals = 0
        self._failures = 0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    def wait_s(self, error: NoRoom | Unavailable) -> float:
        """Seconds to wait before the next attempt. Raises `error` if there is none left."""
        if isinstance(error, NoRoom):
            self._refusals += 1
            if self._refusals % self._servers:
                return 0.0
            last, wait_s = self._refusals == ROUNDS * self._servers, error.retry_after_s
        else:
            self._failures += 1
            last = self._failures == ATTEMPTS or not self._after_unavailable
            wait_s = FIRST_WAIT_S * 2 ** (self._failures - 1) * random.uniform(0.8, 1.2)
        if last or wait_s is None or wait_s >= self.left_s:
            raise error
        return wait_s


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
