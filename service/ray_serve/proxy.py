"""What Ray's gRPC proxy loads: the services, and what becomes of Ray's own words on the wire.

Owns the one function that is named in `grpc_servicer_functions`. Ray routes each call to a replica;
around that, streams are written so that a client that leaves is noticed and one that stops reading
is ended, a failure's empty message is dropped, and failures that Ray tells in its own way become
the service's. Knows nothing of replicas, and loads no more than it needs.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from a2sf.errors import A2SFError, Aborted, ResourceExhausted, Unavailable
from service.options import ServerOptions
from service.pb import inference_pb2_grpc as pb_grpc
from service.stall import writing
from service.status import DETAILS_KEY, WireStatus, to_wire

STALL_TIMEOUT_S: float = ServerOptions.model_fields["stall_timeout_s"].default
"""Seconds in which a client must take an event before its request is ended, as by the server."""

Context = grpc.aio.ServicerContext[Any, Any]
Stream = Callable[[Any, Context], AsyncGenerator[bytes, None]]
Unary = Callable[[Any, Context], Awaitable[bytes]]


def add_services(servicer: Any, server: Any) -> None:
    """Add the inference, model and health services to the proxy's `server`.

    Raises AttributeError where this Ray makes its handlers in another way than those that were
    tried.
    """
    # Ray makes every handler that is added from now on by this.
    server.service_handler_factory = _told(server.service_handler_factory)
    pb_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    pb_grpc.add_ModelServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


def _told(make: Callable[..., Any]) -> Callable[..., Any]:
    wrappers: dict[str, Callable[[Any], Any]] = {"unary_unary": _unary, "unary_stream": _stream}

    def make_told(service_method: str, streaming_type: str) -> Any:
        handler = make(service_method=service_method, streaming_type=streaming_type)
        # Ray makes one of each kind for every method; of the other kinds we have none.
        return wrappers[streaming_type](handler) if streaming_type in wrappers else handler

    return make_told


def _unary(route: Unary) -> Unary:
    async def answer(request: Any, context: Context) -> bytes:
        response = await route(request, context)
        _settle(context)
        return response

    return answer


def _stream(route: Stream) -> Callable[[Any, Context], Awaitable[None]]:
    async def answer(request: Any, context: Context) -> None:
        unsent: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async for message in route(request, context):
                    if _code(context) is grpc.StatusCode.OK:
                        unsent.put_nowait(message)
            finally:
                unsent.put_nowait(None)

        # A task, because Ray hears that a call is cancelled only while it waits for the replica:
        # cancelled in a write, the completion would go on for nobody.
        reading = asyncio.create_task(read())
        try:
            async with writing(context, STALL_TIMEOUT_S) as writer:
                while (message := await unsent.get()) is not None:
                    await writer.write(message)
            await reading
        except Aborted as error:
            status = to_wire(error, "-")
            reading.cancel()
            await context.abort(status.code, status.details, status.trailers)
        finally:
            reading.cancel()
            await asyncio.wait({reading})
        _settle(context)

    return answer


def _settle(context: Context) -> None:
    """Give a status that is Ray's own the code and the details that it has in the service."""
    trailers = tuple(context.trailing_metadata() or ())
    if DETAILS_KEY in dict(trailers):
        return
    said, code = str(context.details()), _code(context)
    error: A2SFError
    if code is grpc.StatusCode.INTERNAL:
        # A replica tells all failures by itself. Ray's words may hold a traceback.
        error = Unavailable("the replica that had the request has gone; try again")
    elif code is grpc.StatusCode.UNAVAILABLE:
        error = Unavailable(said)
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        error = ResourceExhausted(said)
    else:
        return
    status: WireStatus = to_wire(error, "-")
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata((*trailers, *status.trailers))


def _code(context: Context) -> grpc.StatusCode:
    # Until one is set it is 0, whatever the stubs say.
    return context.code() or grpc.StatusCode.OK
