"""One replica: an engine, with a method for each RPC that Ray's gRPC proxy calls.

Owns the start and end of the replica and its health check. The servicers handle the calls. Knows
nothing of the proxy or of other replicas.
"""

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from a2sf.errors import NotFound, Unauthenticated, Unsupported
from service.backend.loading import load_core
from service.backend.runner import EngineCrashed
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.ray_serve.context import CallContext, Ended, RayContext
from service.rpc.auth import TokenFile
from service.rpc.inference import InferenceServicer, ModelServicer
from service.rpc.startup import make_backend, warm
from service.status import NO_REQUEST_ID, WireStatus, to_wire
from service.telemetry import logs

log = structlog.get_logger(__name__)

SERVICES = tuple(
    pb.DESCRIPTOR.services_by_name[name].full_name for name in ("InferenceService", "ModelService")
)
"""The services of a replica; it has no admin service."""

ANSWERS_LEAVE_S = 0.2
"""Seconds for the failed calls of a crashed engine to reach the proxy."""

FLUSH_S = 2.0
"""Seconds to send pending traces."""

ResponseT = TypeVar("ResponseT", bound=Message)


class Replica:
    """Handles the RPCs of the inference and model services and of health.

    Ray creates, calls and ends it in one event loop.
    """

    async def __init__(self, options: ServerOptions) -> None:  # type: ignore[misc]
        """Load, warm up and open. Raises the errors of loading."""
        logs.configure(options.log_format, options.log_level)
        self._tokens = TokenFile(options.token_file, "--token-file") if options.token_file else None
        self._backend = backend = make_backend(options)
        self._inference = InferenceServicer(backend)
        self._models = ModelServicer(backend)
        # Kept, because the event loop holds only weak references to tasks.
        self._watching = await warm(backend, partial(load_core, options))
        backend.runner.crashed.add_done_callback(self._on_crash)

    def __del__(self) -> None:
        """Send pending traces; Ray calls this after the last call."""
        if hasattr(self, "_backend"):
            self._backend.tracer.shutdown(FLUSH_S)

    @property
    def _crashed(self) -> bool:
        return self._backend.runner.crashed.done()

    async def check_health(self) -> None:
        """Raise EngineCrashed once the engine has died, so that Ray replaces the replica."""
        if self._crashed:
            raise EngineCrashed("the engine's thread died")

    async def StreamGenerate(  # noqa: N802
        self, request: pb.StreamGenerateRequest, grpc_context: RayContext
    ) -> AsyncGenerator[Message, None]:
        """See the proto."""
        context = CallContext(grpc_context)

        async def handle() -> None:
            await self._authenticate("StreamGenerate", context)
            await self._inference.StreamGenerate(request, _as_servicer_context(context))

        async for message in context.messages(handle(), pb.StreamGenerateResponse()):
            yield message

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, grpc_context: RayContext
    ) -> pb.GenerateResponse:
        """See the proto."""
        return await self._unary(
            self._inference.Generate, request, grpc_context, pb.GenerateResponse()
        )

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, grpc_context: RayContext
    ) -> pb.TokenizeResponse:
        """See the proto."""
        return await self._unary(
            self._inference.Tokenize, request, grpc_context, pb.TokenizeResponse()
        )

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, grpc_context: RayContext
    ) -> pb.GetModelResponse:
        """See the proto."""
        return await self._unary(
            self._models.GetModel, request, grpc_context, pb.GetModelResponse()
        )

    async def ListAlphaTables(  # noqa: N802
        self, request: pb.ListAlphaTablesRequest, grpc_context: RayContext
    ) -> pb.ListAlphaTablesResponse:
        """See the proto."""
        return await self._unary(
            self._models.ListAlphaTables, request, grpc_context, pb.ListAlphaTablesResponse()
        )

    async def GetAlphaTable(  # noqa: N802
        self, request: pb.GetAlphaTableRequest, grpc_context: RayContext
    ) -> pb.GetAlphaTableResponse:
        """See the proto."""
        return await self._unary(
            self._models.GetAlphaTable, request, grpc_context, pb.GetAlphaTableResponse()
        )

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayContext
    ) -> Any:
        """See grpc.health.v1. Needs no token, and waits in line with the other calls."""
        status = health_pb2.HealthCheckResponse
        if request.service not in ("", *SERVICES):
            with suppress(Ended):
                error = NotFound(f"no service {request.service!r}; known: {', '.join(SERVICES)}")
                await _abort(CallContext(grpc_context), to_wire(error, NO_REQUEST_ID))
        return status(status=status.NOT_SERVING if self._crashed else status.SERVING)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayContext
    ) -> AsyncGenerator[Message, None]:
        """Refuse: a watch would take a completion's place, and would report only one replica.

        Clients whose channels watch health treat the refusal as SERVING, as grpc.health.v1 defines.
        """
        context = CallContext(grpc_context)

        async def refuse() -> None:
            error = Unsupported("health cannot be watched under Ray Serve; call Check")
            await _abort(context, to_wire(error, NO_REQUEST_ID))

        async for message in context.messages(refuse(), health_pb2.HealthCheckResponse()):
            yield message

    async def _unary(
        self,
        handler: Callable[[Any, Any], Awaitable[ResponseT]],
        request: Message,
        grpc_context: RayContext,
        empty: ResponseT,
    ) -> ResponseT:
        context = CallContext(grpc_context)
        try:
            await self._authenticate(handler.__name__, context)
            return await handler(request, _as_servicer_context(context))
        except Ended:
            return empty

    async def _authenticate(self, method: str, context: CallContext) -> None:
        if self._tokens is None:
            return
        problem = self._tokens.problem(context.invocation_metadata())
        if problem is not None:
            request_id = uuid.uuid4().hex
            log.info("call refused", request_id=request_id, method=method, reason=problem)
            await _abort(context, to_wire(Unauthenticated(problem), request_id))

    def _on_crash(self, crashed: "asyncio.Future[BaseException]") -> None:
        self._backend.gate.close("the engine of this replica has died; try again")
        self._exiting = asyncio.create_task(self._exit_process())

    async def _exit_process(self) -> None:
        """End the process, as the server does when its engine has died.

        Until three health checks have failed, Ray still sends calls here, and more than to other
        replicas, because calls fail fast: a client would use up its retries on this replica.
        """
        await self._backend.gate.wait_until_empty()
        await asyncio.sleep(ANSWERS_LEAVE_S)
        os._exit(1)


def _as_servicer_context(context: CallContext) -> grpc.aio.ServicerContext[Any, Any]:
    # The servicers use only the methods that it has.
    return cast("grpc.aio.ServicerContext[Any, Any]", context)


async def _abort(context: CallContext, status: WireStatus) -> None:
    await context.abort(status.code, status.details, status.trailers)
