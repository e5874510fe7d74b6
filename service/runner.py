"""The engine's own thread, and the way between it and the event loop.

Owns the thread, its inbox, and one queue of events for each request. The engine is built, used and
dropped in this thread alone; the loop is never blocked by it. Should the thread die, every stream
fails at once and `crashed` tells the server, so that nobody waits for an answer that cannot come.
Knows nothing of gRPC.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from a2sf.errors import A2SFError, InvalidArgument, Unavailable
from a2sf.requests import Event, Finished, GenerationRequest

log = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What the thread needs of an engine; `a2sf.engine.Engine` is one."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""

    def submit(self, request: GenerationRequest) -> None:
        """Validate and queue a request."""

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""

    def step(self) -> list[Event]:
        """Do one round of work."""


class EngineHolder(Protocol):
    """What the build function returns: an engine, with whatever was loaded for it."""

    @property
    def engine(self) -> EngineLike:
        """The engine."""


Holder = TypeVar("Holder", bound=EngineHolder)


class EngineCrashed(Exception):
    """The engine's thread died. Not of the users' tree: a client learns only that we failed."""


Channel: TypeAlias = asyncio.Queue[Event | Exception]


@dataclass(frozen=True)
class _Submit:
    request: GenerationRequest
    channel: Channel


@dataclass(frozen=True)
class _Cancel:
    request_id: str


_STOP = object()


class EngineRunner:
    """Runs one engine in one thread. All methods belong to the event loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._channels: dict[str, Channel] = {}
        self._ended: Callable[[], Exception] | None = None
        self._thread: threading.Thread | None = None
        self.crashed: asyncio.Future[BaseException] = self._loop.create_future()
        """Done, with the cause, once the thread has died of an error."""

    @property
    def active(self) -> int:
        """Requests under way."""
        return len(self._channels)

    async def start(self, build: Callable[[], Holder]) -> Holder:
        """Start the thread, call `build` in it, and return what that returned or raised."""
        built: asyncio.Future[Holder] = self._loop.create_future()
        # A daemon: a load or a kernel that never returns must not keep the process alive.
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="engine", daemon=True
        )
        self._thread.start()
        return await built

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Submit `request` and yield its events, the last one `Finished`.

        Close the generator (`contextlib.aclosing`) to leave early: that frees the row. Raises what
        `submit` raises, Unavailable once the runner stops, EngineCrashed if the thread dies.
        """
        if self._ended is not None:
            raise self._ended()
        if request.request_id in self._channels:
            raise InvalidArgument(
                "request_id", f"{request.request_id!r} is the id of a request under way"
            )
        channel: Channel = asyncio.Queue()
        self._channels[request.request_id] = channel
        self._inbox.put(_Submit(request, channel))
        finished = False
        try:
            while not finished:
                item = await channel.get()
                if isinstance(item, Exception):
                    raise item
                finished = isinstance(item, Finished)
                yield item
        finally:
            # The inbox keeps order: a later request may take the same id.
            if not finished:
                self._inbox.put(_Cancel(request.request_id))
            self._channels.pop(request.request_id, None)

    def fail_all(self, failure: Callable[[], Exception]) -> None:
        """End every stream with a `failure()` of its own, and refuse later ones with one."""
        self._ended = failure
        for channel in self._channels.values():
            channel.put_nowait(failure())

    async def stop(self, timeout_s: float) -> bool:
        """End all streams as Unavailable, then the thread; return whether it ended in time."""
        self.fail_all(lambda: Unavailable("the server is shutting down"))
        if self._thread is None:
            return True
        self._inbox.put(_STOP)
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _run(self, build: Callable[[], Holder], built: "asyncio.Future[Holder]") -> None:
        try:
            holder = build()
        except BaseException as error:
            self._post(_settle, built, None, error)
            return
        self._post(_settle, built, holder, None)
        try:
            self._serve(holder.engine)
        except BaseException as error:
            log.critical("engine thread died", exc_info=True)
            self._post(self._on_crash, error)

    def _serve(self, engine: EngineLike) -> None:
        channels: dict[str, Channel] = {}
        while True:
            # Without work there is nothing to do but wait for some.
            wait = not engine.has_work
            while wait or not self._inbox.empty():
                command = self._inbox.get()
                wait = False
                if command is _STOP:
                    return
                if isinstance(command, _Submit):
                    self._submit(engine, command, channels)
                elif isinstance(command, _Cancel):
                    channels.pop(command.request_id, None)
                    engine.cancel(command.request_id)
            if engine.has_work:
                self._dispatch(engine.step(), channels)

    def _submit(self, engine: EngineLike, command: _Submit, channels: dict[str, Channel]) -> None:
        try:
            engine.submit(command.request)
        # Whatever a request makes of validation is that request's failure, not the server's.
        except Exception as error:
            if not isinstance(error, A2SFError):
                log.exception("request_id=%s submit failed", command.request.request_id)
            self._post(_put_all, [(command.channel, error)])
        else:
            channels[command.request.request_id] = command.channel

    def _dispatch(self, events: list[Event], channels: dict[str, Channel]) -> None:
        batch: list[tuple[Channel, Event | Exception]] = []
        for event in events:
            channel = channels.get(event.request_id)
            if channel is not None:
                batch.append((channel, event))
                if isinstance(event, Finished):
                    del channels[event.request_id]
        # One wake-up of the loop for the whole batch, not one for each token.
        if batch:
            self._post(_put_all, batch)

    def _on_crash(self, cause: BaseException) -> None:
        self.fail_all(lambda: EngineCrashed("the engine's thread died"))
        if not self.crashed.done():
            self.crashed.set_result(cause)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop is closed: the process is ending and nobody listens any more.
            log.debug("event loop closed before the engine's thread ended")


def _put_all(batch: list[tuple[Channel, Event | Exception]]) -> None:
    for channel, item in batch:
        channel.put_nowait(item)


def _settle(future: "asyncio.Future[Holder]", value: Holder, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
