"""From settings to a backend that takes calls, and back, whoever brings the calls.

Owns how a backend is made, warmed and ended: the model is loaded in the engine's thread, one tiny
completion is made, the tables are watched, the gate opens. Knows nothing of ports, nor of who is
told that it serves.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import structlog

from a2sf.errors import NonFinite, Unavailable
from a2sf.policy import CachePolicy
from a2sf.requests import GenerationRequest
from service import tracing
from service.answering import SERVICE_OF, Backend
from service.core import Core
from service.gate import Gate
from service.metrics import Metrics
from service.options import ServerOptions
from service.runner import EngineRunner, RequestFailed
from service.watch import watch

log = structlog.get_logger(__name__)

WATCHING = "tables watched"
"""The name of that task."""


def make_backend(options: ServerOptions) -> Backend:
    """Make a backend whose gate is closed, in the event loop that will use it."""
    return Backend(
        options,
        Gate(),
        EngineRunner(max_unread=options.max_unread),
        Metrics(SERVICE_OF),
        tracing.start(options.traces),
    )


async def warm(backend: Backend, load: Callable[[], Core]) -> "asyncio.Task[None] | None":
    """Load, make one tiny completion, and open the gate.

    Returns the task that watches the tables, where they are watched, to be given to `end`. Raises
    what loading raises, and NonFinite where the tiny completion has no finite logits.
    """
    runner, options = backend.runner, backend.options
    backend.core = core = await runner.start(load)
    # Two new tokens, so that a decode step is run; preset full needs no budget.
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
        catalog=lambda: core.tables.now,
    )
    watching = None
    if options.watch_tables and core.tables.directory is not None:
        watching = asyncio.create_task(
            watch(core.tables, core.tables.directory, backend.reload_tables), name=WATCHING
        )
        watching.add_done_callback(_tell_why)
    backend.gate.open(core.config.max_batch + core.config.max_waiting)
    return watching


async def end_calls(backend: Backend, watching: "asyncio.Task[None] | None") -> None:
    """Close the gate, watch no more, and end every call with a status.

    The engine's thread and the tracer are left to the caller, who knows when statuses have left.
    """
    backend.gate.close("the server is shutting down")
    if watching is not None:
        watching.cancel()
        # Not its result: why it ended, if it did, is told already.
        await asyncio.wait({watching})
    if not backend.runner.crashed.done():
        backend.runner.fail_all(lambda: Unavailable("the server is shutting down"))


def _tell_why(watching: "asyncio.Task[None]") -> None:
    if not watching.cancelled() and (error := watching.exception()) is not None:
        log.error("tables are no longer watched", exc_info=error)
