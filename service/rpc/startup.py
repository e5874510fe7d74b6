"""Starts a backend and ends it, for any kind of port.

Owns how a backend is made, warmed and ended: load the model in the engine's thread, generate one
tiny completion, watch the tables, open the gate. Knows nothing of ports and health.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import structlog

from a2sf.errors import NonFinite, Unavailable
from a2sf.policy import CachePolicy
from a2sf.requests import GenerationRequest
from service.backend.loading import Core
from service.backend.runner import EngineRunner, RequestFailed
from service.backend.watch import watch
from service.config.options import ServerOptions
from service.rpc.gate import Gate
from service.rpc.lifecycle import SERVICE_OF, Backend
from service.telemetry import tracing
from service.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

WATCHING = "tables watched"
"""Name of the asyncio task."""


def make_backend(options: ServerOptions) -> Backend:
    """Make a backend with a closed gate. Call it in the event loop that will use the backend."""
    return Backend(
        options,
        Gate(),
        EngineRunner(max_unread=options.max_unread),
        Metrics(SERVICE_OF),
        tracing.start(options.traces),
    )


async def warm(backend: Backend, load: Callable[[], Core]) -> "asyncio.Task[None] | None":
    """Load, generate one tiny completion, and open the gate.

    Returns the task that watches the tables, if they are watched; pass it to `end_calls`. Raises
    the errors of `load`, and NonFinite if the tiny completion has logits that are not finite.
    """
    runner, options = backend.runner, backend.options
    backend.core = core = await runner.start(load)
    # Two new tokens, so that a decode step runs; the preset full needs no budget.
    request = GenerationRequest(
        request_id="warm-up",
        prompt_ids=(0,),
        max_new_tokens=2,
        ignore_eos=True,
        cache_policy=CachePolicy(preset="full"),
    )
    try:
        async with aclosing(runner.stream(request)) as events:
            async for _ in events:
                pass
    except RequestFailed as error:
        if isinstance(error.__cause__, NonFinite):
            raise error.__cause__ from None
        raise
    backend.metrics.serving(
        model=core.model.identity.id,
        device=core.model.device.type,
        dtype=core.model.dtype_name,
        load=lambda: backend.load,
        tables=lambda: core.tables.now,
    )
    watching = None
    if options.watch_tables and core.tables.directory is not None:
        watching = asyncio.create_task(
            watch(core.tables, core.tables.directory, backend.reload_tables), name=WATCHING
        )
        watching.add_done_callback(_log_failure)
    backend.gate.open(core.config.max_batch + core.config.max_waiting)
    return watching


async def end_calls(backend: Backend, watching: "asyncio.Task[None] | None") -> None:
    """Close the gate, stop watching tables, and end every call with a status.

    The caller ends the engine's thread and the tracer, once the statuses have been sent.
    """
    backend.gate.close("the server is shutting down")
    if watching is not None:
        watching.cancel()
        # Not its result: if the task failed, that was logged already.
        await asyncio.wait({watching})
    if not backend.runner.crashed.done():
        backend.runner.fail_all(lambda: Unavailable("the server is shutting down"))


def _log_failure(watching: "asyncio.Task[None]") -> None:
    if not watching.cancelled() and (error := watching.exception()) is not None:
        log.error("tables are no longer watched", exc_info=error)
