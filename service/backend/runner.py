"""Runs the engine in its thread, and connects it with the event loop.

Owns the thread, its inbox, and one queue of events per request. Only this thread builds, uses and
drops the engine, so the engine never blocks the loop. A queue holds a limited number of events: a
reader that stops reading loses its stream, and the server keeps its memory. If the engine fails at
a request, the failure is logged here, once, and the reader gets RequestFailed. If the thread dies,
every stream fails at once, and `crashed` informs the server, so that no call waits forever. Knows
nothing of gRPC.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import structlog

from a2sf.errors import (
    A2SFError,
    Aborted,
    InvalidArgument,
    Unavailable,
    first_line,
    raise_if_fatal,
)
from a2sf.requests import Event, Failed, Finished, GenerationRequest, StepEvent
from service.backend.engine_protocol import EngineHolder, EngineLoad, EngineProtocol
from service.backend.event_queue import EventQueue
from service.config.groups import MAX_UNREAD
from service.telemetry.logs import LoggedFailure

log = structlog.get_logger(__name__)

Holder = TypeVar("Holder", bound=EngineHolder)


class RequestFailed(LoggedFailure):
    """The engine failed at one request and continues with the others. The cause is `__cause__`."""


class EngineCrashed(Exception):
    """The engine's thread died. Not an A2SFError, so a client sees only an internal error."""


@dataclass(frozen=True)
class _Submit:
    request: GenerationRequest
    events: EventQueue


@dataclass(frozen=True)
class _Cancel:
    request_id: str


_STOP = object()


class EngineRunner:
    """Runs one engine in one thread. Call all methods in the event loop that created it.

    A stream ends with `Finished`, or with an error. An error ends it at once: unread events are
    dropped, and the row is freed. If `Finished` is already queued, the stream ends with that.
    """

    def __init__(self, *, max_unread: int = MAX_UNREAD) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_unread = max_unread
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._streams: dict[str, EventQueue] = {}
        self._engine: EngineProtocol | None = None
        self._ended: Callable[[], Exception] | None = None
        self._thread: threading.Thread | None = None
        self.crashed: asyncio.Future[BaseException] = self._loop.create_future()
        """Done, with the cause, once the thread has died of an error."""

    @property
    def active(self) -> int:
        """Number of streams with a reader."""
        return len(self._streams)

    @property
    def unread(self) -> int:
        """Events that wait for their readers, over all streams."""
        return sum(events.unread for events in self._streams.values())

    @property
    def load(self) -> EngineLoad:
        """Number of requests in the engine; 0 before it is built."""
        if self._engine is None:
            return EngineLoad(running=0, waiting=0, kv_bytes_used=0)
        # The thread runs meanwhile. Each number was right a moment ago, except for a request that
        # is just moving from one state to the next. That is enough, because the numbers are only
        # shown: no decision depends on them. With a lock, a reader would wait for a step.
        return EngineLoad(
            running=self._engine.running,
            waiting=self._engine.waiting,
            kv_bytes_used=self._engine.kv_bytes_used,
        )

    async def start(self, build: Callable[[], Holder]) -> Holder:
        """Start the thread, run `build` in it, and return its result or raise its error."""
        built: asyncio.Future[Holder] = self._loop.create_future()
        # A daemon, so that a load or kernel that never returns cannot keep the process alive.
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="engine", daemon=True
        )
        self._thread.start()
        holder = await built
        self._engine = holder.engine
        return holder

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Submit `request` and yield its events; the last one is `Finished`.

        To leave early, close the generator (`contextlib.aclosing`); that frees the row.

        Raises the A2SFError of `submit`; InvalidArgument if the id is already in use; RequestFailed
        if the engine fails at this request; Aborted if `abort` ends it or too many events are
        unread; Unavailable once the runner stops; EngineCrashed if the thread dies.
        """
        if self._ended is not None:
            raise self._ended()
        if request.request_id in self._streams:
            raise InvalidArgument(
                "request_id", f"{request.request_id!r} is the id of a running request; give another"
            )
        events = self._streams[request.request_id] = EventQueue(request.request_id)
        self._inbox.put(_Submit(request, events))
        finished = False
        try:
            while not finished:
                event = await events.get()
                finished = isinstance(event, Finished)
                yield event
        finally:
            # The inbox keeps the order, so a later request may use the same id.
            if events.open:
                events.open = False
                self._inbox.put(_Cancel(request.request_id))
            del self._streams[request.request_id]

    def abort(self, request_ids: Collection[str] | None) -> tuple[str, ...]:
        """Abort the named requests (None: all); return the ids of those that were under way."""
        names = tuple(self._streams) if request_ids is None else request_ids
        ended = []
        for name in names:
            events = self._streams.get(name)
            if events is not None and events.open:
                self._end(events, Aborted("an operator aborted this request"))
                ended.append(name)
        return tuple(ended)

    def fail_all(self, failure: Callable[[], Exception]) -> None:
        """End every stream with a new `failure()`, and refuse later ones in the same way."""
        self._ended = failure
        for events in self._streams.values():
            if events.open:
                self._end(events, failure())

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
            self._post(_resolve, built, None, error)
            return
        self._post(_resolve, built, holder, None)
        try:
            self._serve(holder.engine)
        except BaseException as error:
            log.critical("engine thread died", exc_info=True)
            self._post(self._on_crash, error)

    def _serve(self, engine: EngineProtocol) -> None:
        streams: dict[str, EventQueue] = {}
        while True:
            # Without work, wait for one command. With work, take only the commands that are there
            # now, so that a constant flow of commands cannot delay the next step of the rows.
            for _ in range(self._inbox.qsize() if engine.has_work else 1):
                command = self._inbox.get()
                if command is _STOP:
                    return
                if isinstance(command, _Submit):
                    # Skip a request that was already cancelled, so that a step never waits for more
                    # validations than there are readers.
                    if command.events.open:
                        self._submit(engine, command, streams)
                elif isinstance(command, _Cancel):
                    streams.pop(command.request_id, None)
                    engine.cancel(command.request_id)
            if engine.has_work:
                self._dispatch(engine.step(), streams)

    def _submit(
        self, engine: EngineProtocol, command: _Submit, streams: dict[str, EventQueue]
    ) -> None:
        try:
            engine.submit(command.request)
        # Any error of validation is a failure of this request, not of the server.
        except BaseException as error:
            raise_if_fatal(error)
            failure = (
                error
                if isinstance(error, A2SFError)
                else _log_failure(command.request.request_id, error)
            )
            self._post(self._refuse, command.events, failure)
        else:
            streams[command.request.request_id] = command.events

    def _dispatch(self, step_events: list[StepEvent], streams: dict[str, EventQueue]) -> None:
        batch: list[tuple[EventQueue, Event | RequestFailed]] = []
        for event in step_events:
            # Also log the failure of a request that has no reader any more.
            delivered = (
                _log_failure(event.request_id, event.error) if isinstance(event, Failed) else event
            )
            events = streams.get(event.request_id)
            if events is not None:
                batch.append((events, delivered))
                if isinstance(event, Finished | Failed):
                    del streams[event.request_id]
        # Wake the loop once for the whole batch, not once per token.
        if batch:
            self._post(self._deliver, batch)

    def _refuse(self, events: EventQueue, error: Exception) -> None:
        if events.open:
            events.fail(error)

    def _deliver(self, batch: list[tuple[EventQueue, Event | RequestFailed]]) -> None:
        for events, event in batch:
            # The engine sent this before it learned that the stream had ended.
            if not events.open:
                continue
            if isinstance(event, RequestFailed):
                events.fail(event)
                continue
            if events.unread < self._max_unread:
                events.put(event)
                continue
            log.warning("client stopped reading", request_id=events.request_id)
            self._end(
                events,
                Aborted(
                    f"the client stopped reading: {events.unread} events wait for it, and the "
                    "server keeps no more"
                ),
            )

    def _end(self, events: EventQueue, error: Exception) -> None:
        events.fail(error)
        self._inbox.put(_Cancel(events.request_id))

    def _on_crash(self, cause: BaseException) -> None:
        self.fail_all(lambda: EngineCrashed("the engine's thread died"))
        if not self.crashed.done():
            self.crashed.set_result(cause)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop is closed: the process is ending and no reader is left.
            log.debug("event loop closed before the engine's thread ended")


def _log_failure(request_id: str, error: BaseException) -> RequestFailed:
    """Log the engine's failure at one request; return the error for its reader."""
    log.error("request failed", request_id=request_id, reason=first_line(error), exc_info=error)
    failed = RequestFailed("the engine failed at this request")
    failed.__cause__ = error
    return failed


def _resolve(future: "asyncio.Future[Holder]", value: Holder, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
