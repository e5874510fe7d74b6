"""The common part of every call: admission, status, log line, metrics and trace.

Owns the state that handlers share, and `call_scope`, the context manager of every handler.
It passes the gate, turns every error into a status, and reports the call to log, metrics and trace,
with the request id and figures, never with text. Knows nothing of what a call does.
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
from service.backend.default_table import log_default_policy
from service.backend.loading import Core
from service.backend.runner import EngineRunner
from service.backend.tables import Reloaded
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.rpc.gate import Gate
from service.status import to_wire
from service.telemetry.metrics import CompletionMetrics, Metrics, ServerLoad
from service.telemetry.tracing import CallSpan, Tracer

log = structlog.get_logger(__name__)

ABORT_S = 2.0
"""Seconds to wait for the status of a failed call to be sent."""

MAX_PREPARING = 4
"""Requests whose prompts are prepared at the same time.

asyncio's default thread pool has at least five threads, so one or more stay free for tables and
shutdown.
"""

Result = TypeVar("Result")

SERVICE_OF = {
    method.name: service.full_name
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Full service name of each method; method names are unique across services."""


class Backend:
    """What handlers share: settings, gate, runner, metrics, tracer, and the core once loaded."""

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
        self._preparing = asyncio.Semaphore(MAX_PREPARING)

    @property
    def loaded(self) -> bool:
        """Whether the core is loaded."""
        return self._core is not None

    @property
    def core(self) -> Core:
        """The loaded core. It is set before the gate opens."""
        assert self._core is not None, "the gate opens only once the core is loaded"
        return self._core

    @core.setter
    def core(self, core: Core) -> None:
        self._core = core

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """Run `work`, which may be slow, in a thread; return its result or raise its error.

        If the caller is cancelled, wait until running work ends: a thread cannot be stopped. So a
        call holds its place at the gate for as long as it uses resources.
        """
        async with self._preparing:
            working = asyncio.create_task(asyncio.to_thread(work))
            try:
                await asyncio.wait({working})
            except asyncio.CancelledError:
                await asyncio.wait({working})
                # Read the exception; asyncio logs exceptions that are never read.
                working.exception()
                raise
            return working.result()

    async def reload_tables(self) -> Reloaded:
        """Read the directory of tables again in a thread, and count it in the metrics.

        If the default table has changed, log the new default policy.

        Raises NotFound if the directory cannot be read; then nothing changes.
        """
        try:
            reloaded = await asyncio.to_thread(self.core.tables.reload)
        except NotFound:
            self.metrics.reloaded("failed")
            raise
        changed = reloaded.added or reloaded.changed or reloaded.removed
        self.metrics.reloaded("changed" if changed else "unchanged")
        store = self.core.tables.now
        if store.default in reloaded.changed:
            log_default_policy(self.core.config, store)
        return reloaded

    @property
    def load(self) -> ServerLoad:
        """The current load; may be read from any thread."""
        engine = self.runner.load
        return ServerLoad(
            running=engine.running,
            waiting=engine.waiting,
            admitted=self.gate.admitted,
            capacity=self.gate.capacity,
            kv_bytes_used=engine.kv_bytes_used,
            kv_bytes_limit=self.core.engine.kv_slab_bytes,
        )


@dataclass
class CallState:
    """State of one call for log, metrics and trace, and for the status of a failure."""

    span: CallSpan
    completion: CompletionMetrics
    """Measures tokens; used only by calls that generate some."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Random, unless a completion brings its own."""
    outcome: str = "INTERNAL"
    """Name of the status code; OK once the handler has succeeded."""
    figures: dict[str, Any] = field(default_factory=dict)


class CallKind(enum.Enum):
    """How a call is admitted."""

    ORDINARY = "ordinary"
    COMPLETION = "completion"
    """Takes one of the places for completions."""
    ADMIN = "admin"
    """Also admitted while the server drains; draining does not wait for it."""


@contextmanager
def _admitted(backend: Backend, kind: CallKind) -> Iterator[None]:
    if kind is CallKind.ADMIN:
        if not backend.loaded:
            raise Unavailable("the server is starting")
        yield
        return
    place = backend.gate.admit if kind is CallKind.COMPLETION else nullcontext
    with backend.gate.enter(), place():
        yield


@asynccontextmanager
async def call_scope(
    method: str,
    backend: Backend,
    context: grpc.aio.ServicerContext[Any, Any],
    kind: CallKind = CallKind.ORDINARY,
) -> AsyncIterator[CallState]:
    """Run a call: pass the gate, set its status, and report it to log, metrics and trace."""
    arrived = time.monotonic()
    metadata = tuple(context.invocation_metadata() or ())
    with backend.tracer.call(SERVICE_OF[method], method, metadata) as span:
        call = CallState(span, backend.metrics.completion())
        try:
            with _admitted(backend, kind):
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
            # If the client has stopped reading, its status waits behind unread messages. gRPC keeps
            # it while the connection is open, so this call need not wait.
            with suppress(TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    try:
                        await context.abort(status.code, status.details, status.trailers)
                    except grpc.aio.InternalError:
                        # The connection broke while the status was sent; there is no client left.
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
