"""The services in Ray's gRPC proxy, and the translation of Ray's errors.

Owns the function that `grpc_servicer_functions` names. Ray routes each call to a replica. Around
that, this module writes streams so that a client that leaves is noticed and one that stops reading
is aborted, drops the empty message of a failed call, and converts Ray's own failures to the
service's. Knows nothing of replicas, and imports little.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from a2sf.errors import A2SFError, Aborted, ResourceExhausted, Unavailable
from service.config.options import ServerOptions
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.malformed import (
    UndecodableRequest,
    abort_undecodable,
    lenient_decoder,
    rebuild_handler,
)
from service.rpc.stall import stream_writer
from service.status import DETAILS_KEY, NO_REQUEST_ID, to_wire

STALL_TIMEOUT_S: float = ServerOptions.model_fields["stall_timeout_s"].default
"""Seconds within which a client must accept an event, or its request is aborted; as in the
server."""

Context = grpc.aio.ServicerContext[Any, Any]
Stream = Callable[[Any, Context], AsyncGenerator[bytes, None]]
Unary = Callable[[Any, Context], Awaitable[bytes]]


def add_services(servicer: Any, server: Any) -> None:
    """Add the inference, model and health services to the proxy's `server`.

    Raises AttributeError if this version of Ray creates its handlers in another way than the tested
    versions.
    """
    # Ray creates every handler that is added from now on with this factory.
    server.service_handler_factory = _wrapping_factory(server.service_handler_factory)
    lenient: Any = _LenientServer(server)
    pb_grpc.add_InferenceServiceServicer_to_server(servicer, lenient)
    pb_grpc.add_ModelServiceServicer_to_server(servicer, lenient)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, lenient)


class _LenientServer:
    """Wraps the server that handlers are added to, so that they receive undecodable requests."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, _: Any) -> None:
        """Do nothing: generated code passes the same handlers to the next method."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Add the handlers of a service, both as generic and as registered handlers."""
        readers = {
            name: rebuild_handler(
                handler,
                handler.unary_stream or handler.unary_unary,
                lenient_decoder(handler.request_deserializer),
            )
            for name, handler in handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(service, readers)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_registered_method_handlers(service, readers)


def _wrapping_factory(make: Callable[..., Any]) -> Callable[..., Any]:
    wrappers: dict[str, Callable[[Any], Any]] = {"unary_unary": _unary, "unary_stream": _stream}

    def make_wrapped(service_method: str, streaming_type: str) -> Any:
        handler = make(service_method=service_method, streaming_type=streaming_type)
        # Ray creates a handler of each kind for every method; we have no methods of other kinds.
        if streaming_type not in wrappers:
            return handler
        return _readable(service_method, wrappers[streaming_type](handler))

    return make_wrapped


def _readable(method: str, handle: Callable[[Any, Context], Awaitable[Any]]) -> Any:
    async def answer_or_refuse(request: Any, context: Context) -> Any:
        if isinstance(request, UndecodableRequest):
            await abort_undecodable(method, context)
        return await handle(request, context)

    return answer_or_refuse


def _unary(route: Unary) -> Unary:
    async def handle(request: Any, context: Context) -> bytes:
        response = await route(request, context)
        await _end_failed_call(context)
        return response

    return handle


def _stream(route: Stream) -> Callable[[Any, Context], Awaitable[None]]:
    async def handle(request: Any, context: Context) -> None:
        unsent: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async for message in route(request, context):
                    if _code(context) is grpc.StatusCode.OK:
                        unsent.put_nowait(message)
            finally:
                unsent.put_nowait(None)

        # A task, because Ray notices a cancelled call only while it waits for the replica:
        # cancelled during a write, the completion would continue without a reader.
        reading = asyncio.create_task(read())
        try:
            async with stream_writer(context, STALL_TIMEOUT_S) as writer:
                while (message := await unsent.get()) is not None:
                    await writer.write(message)
            await reading
        except Aborted as error:
            # Cancel before the status is sent: that waits behind what the client has not read.
            reading.cancel()
            status = to_wire(error, NO_REQUEST_ID)
            await context.abort(status.code, status.details, status.trailers)
        finally:
            reading.cancel()
            await asyncio.wait({reading})
        await _end_failed_call(context)

    return handle


async def _end_failed_call(context: Context) -> None:
    """End a failed call; if the failure is Ray's own, use the service's code and details.

    Ends it with `abort`, because a status after a response also sends initial metadata, and the
    client does not retry a call that has received any.
    """
    code, details = _code(context), str(context.details())
    trailers = tuple(context.trailing_metadata() or ())
    if code is grpc.StatusCode.OK:
        return
    # A replica reports all of its failures itself, with details.
    error = None if DETAILS_KEY in dict(trailers) else _service_error(code, details)
    if error is not None:
        status = to_wire(error, NO_REQUEST_ID)
        code, details, trailers = status.code, status.details, (*trailers, *status.trailers)
    await context.abort(code, details, trailers)


def _service_error(code: grpc.StatusCode, details: str) -> A2SFError | None:
    """Convert a failure of Ray's proxy to an error of the service; None: pass it on unchanged."""
    match code:
        case grpc.StatusCode.INTERNAL:
            # Without Ray's text, which may contain a traceback.
            return Unavailable("the replica with this request has stopped; try again")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.NOT_FOUND:
            # NOT_FOUND: the application is not deployed yet, or is draining.
            return Unavailable(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(details)
    return None


def _code(context: Context) -> grpc.StatusCode:
    # None until a code is set, contrary to the stubs.
    code: Any = context.code()
    return code or grpc.StatusCode.OK
