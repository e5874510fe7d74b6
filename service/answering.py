"""The course of every call: its way in, its status, and what is seen of it.

Owns what handlers share, and `answering`, in which every one of them runs: it holds the gate, turns
errors into statuses, lets nothing else out, and tells log, metrics and trace at the end, with the
request id and figures, never with text. Knows nothing of what a call asks.
"""

import asyncio
import enum
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import structlog

from a2sf.errors import NotFound, Unavailable, raise_if_fatal
from service.core import Core
from service.gate import Gate
from service.metrics import Completion, Metrics
from service.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.runner import EngineRunner
from service.status import to_wire
from service.tables import Reloaded
from service.tracing import CallSpan, Tracer

log = structlog.get_logger(__name__)

ABORT_S = 2.0
"""Time for a failure's status to leave."""

PREPARING = 4
"""Requests whose prompts are read at a time.

Python's shared threads are five at least, so that neither tables nor the end wait behind prompts.
"""

Prepared = TypeVar("Prepared")

SERVICE_OF = {
    method.name: service.full_name
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""The service of each method; no two have methods of one name."""


@dataclass(frozen=True)
class Load:
    """How much of the server is taken at this moment; the fields are those of GetLoad's answer."""

    running: int
    waiting: int
    admitted: int
    capacity: int
    kv_bytes_used: int
    kv_bytes_limit: int


class Backend:
    """What the handlers share: settings, gate, runner, sight, and the core once it is loaded."""

    def __init__(
        self,
        options: ServerOptions,
        gate: Gate,
        runner: EngineRunner,
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        self.options = options
        self.gate = gate
        self.runner = runner
        self.metrics = metrics
        self.tracer = tracer
        self._core: Core | None = None
        self._preparing = asyncio.Semaphore(PREPARING)

    @property
    def loaded(self) -> bool:
        """Whether there is a core."""
        return self._core is not None

    @property
    def core(self) -> Core:
        """The loaded core; there is one before the gate opens."""
        assert self._core is not None, "the gate opens only once the core is loaded"
        return self._core

    @core.setter
    def core(self, core: Core) -> None:
        self._core = core

    async def prepare(self, work: Callable[[], Prepared]) -> Prepared:
        """Do `work`, which may take its time, in a thread, and return or raise what that does.

        Whoever is cancelled meanwhile stays until work that has begun is done, for a thread cannot
        be ended: so a call keeps its place at the gate for as long as it costs anything.
        """
        async with self._preparing:
            working = asyncio.create_task(asyncio.to_thread(work))
            try:
                await asyncio.wait({working})
            except asyncio.CancelledError:
                await asyncio.wait({working})
                # Asked for, because asyncio logs what nobody asks for.
                working.exception()
                raise
            return working.result()

    async def reload_tables(self) -> Reloaded:
        """Have the directory of tables read again, off the loop, and count it.

        Raises NotFound where there is none to be read; all stays as it was then.
        """
        try:
            told = await asyncio.to_thread(self.core.tables.reload)
        except NotFound:
            self.metrics.reloaded("failed")
            raise
        changed = told.added or told.changed or told.removed
        self.metrics.reloaded("changed" if changed else "unchanged")
        return told

    @property
    def load(self) -> Load:
        """How much is taken; may be asked from any thread."""
        engine = self.runner.load
        return Load(
            running=engine.running,
            waiting=engine.waiting,
            admitted=self.gate.admitted,
            capacity=self.gate.capacity,
            kv_bytes_used=engine.kv_bytes_used,
            kv_bytes_limit=self.core.engine.kv_slab_bytes,
        )


@dataclass
class Call:
    """One call's name and figures, for log, metrics and trace, and for the status of a failure."""

    span: CallSpan
    completion: Completion
    """Measures the tokens; of use to calls that make some."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Made up, but for completions that bring their own."""
    outcome: str = "INTERNAL"
    """The status code's name; OK once the handler is through."""
    figures: dict[str, Any] = field(default_factory=dict)


class Door(enum.Enum):
    """By which way a call comes in."""

    ORDINARY = "ordinary"
    COMPLETION = "completion"
    """It takes one of the places of completions."""
    OPERATOR = "operator"
    """It is let in while the server drains, too, and drains do not wait for it."""


@contextmanager
def _inside(backend: Backend, door: Door) -> Iterator[None]:
    if door is Door.OPERATOR:
        if not backend.loaded:
            raise Unavailable("the server is starting")
        yield
        return
    place = backend.gate.admit if door is Door.COMPLETION else nullcontext
    with backend.gate.enter(), place():
        yield


@asynccontextmanager
async def answering(
    method: str,
    backend: Backend,
    context: grpc.aio.ServicerContext[Any, Any],
    door: Door = Door.ORDINARY,
) -> AsyncIterator[Call]:
    """Be within a call: its place at the gate, its status, and what is seen of it."""
    arrived = time.monotonic()
    metadata = tuple(context.invocation_metadata() or ())
    with backend.tracer.call(SERVICE_OF[method], method, metadata) as span:
        call = Call(span, backend.metrics.completion())
        try:
            with _inside(backend, door):
                yield call
            call.outcome = "OK"
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            passed = remaining is not None and remaining <= 0
            call.outcome = "DEADLINE_EXCEEDED" if passed else "CANCELLED"
            raise
        except BaseException as error:
            raise_if_fatal(error)
            status = to_wire(error, call.request_id)
            call.outcome = status.code.name
            # The status of a client that has stopped reading waits behind what it has not read:
            # gRPC keeps it for as long as the connection stands, and this call need not.
            with suppress(TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    try:
                        await context.abort(status.code, status.details, status.trailers)
                    except grpc.aio.InternalError:
                        # The connection broke while the status was sent: nobody is left to tell.
                        raise asyncio.CancelledError from None
        finally:
            seconds = time.monotonic() - arrived
            span.status(call.outcome)
            backend.metrics.answered(method, call.outcome, seconds)
            log.info(
                "answered",
                request_id=call.request_id,
                method=method,
                outcome=call.outcome,
                seconds=round(seconds, 3),
                **call.figures,
            )
