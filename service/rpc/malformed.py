"""Answers requests that cannot be decoded with INVALID_ARGUMENT.

Owns an interceptor for all services of a port, and its parts for handlers that are built elsewhere.
Without it, gRPC answers UNKNOWN with the text of the parser's exception. Knows nothing of the
content of valid requests.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from a2sf.errors import InvalidRequest
from service.status import NO_REQUEST_ID, to_wire

if TYPE_CHECKING:
    from service.telemetry.metrics import Metrics

    # Generic only in the type stubs.
    Handler = grpc.RpcMethodHandler[Any, Any]

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class UndecodableRequest:
    """Placeholder for a request that the parser could not decode."""


def lenient_decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer that returns `UndecodableRequest` if `decode` raises DecodeError."""

    def read(message: bytes) -> Any:
        try:
            return decode(message)
        except DecodeError:
            return UndecodableRequest()

    return read


def rebuild_handler(handler: Any, behaviour: Any, decode: Callable[[bytes], Any]) -> Any:
    """Return a unary-request `handler` with another behaviour and deserializer."""
    make: Any = (
        grpc.unary_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(behaviour, decode, handler.response_serializer)


async def abort_undecodable(method: str, context: Context) -> None:
    """End the call of an `UndecodableRequest` request with INVALID_ARGUMENT; never returns."""
    name = method.rpartition("/")[2]
    problem = (
        f"cannot be read: the message of {name} is truncated, is not in the Protocol Buffers "
        "format, or has a string that is not UTF-8"
    )
    status = to_wire(InvalidRequest([("request", problem)]), NO_REQUEST_ID)
    await context.abort(status.code, status.details, status.trailers)


class DecodingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses undecodable requests with INVALID_ARGUMENT, for health and reflection too."""

    def __init__(self, metrics: "Metrics") -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler":
        """Wrap the handler, if there is one, with the check."""
        handler = await continuation(handler_call_details)
        # None if the handler reads no request, or if the method does not exist.
        decode = getattr(handler, "request_deserializer", None)
        if decode is None:
            return handler
        method = handler_call_details.method
        rebuild = self._stream if handler.request_streaming else self._unary
        made: Handler = rebuild(method, handler, lenient_decoder(decode))
        return made

    def _unary(self, method: str, handler: Any, read: Callable[[bytes], Any]) -> Any:
        behaviour = handler.unary_stream or handler.unary_unary

        async def handle(request: Any, context: Context) -> Any:
            if isinstance(request, UndecodableRequest):
                await self._abort(method, context)
            return await behaviour(request, context)

        return rebuild_handler(handler, handle, read)

    def _stream(self, method: str, handler: Any, read: Callable[[bytes], Any]) -> Any:
        # Only reflection, whose handler is an async generator.
        behaviour = handler.stream_stream
        assert behaviour is not None, "no method takes a stream and gives one answer"

        async def readable(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            async for request in requests:
                if isinstance(request, UndecodableRequest):
                    await self._abort(method, context)
                yield request

        async def handle(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            async for response in behaviour(readable(requests, context), context):
                yield response

        return grpc.stream_stream_rpc_method_handler(handle, read, handler.response_serializer)

    async def _abort(self, method: str, context: Context) -> None:
        name, outcome = method.rpartition("/")[2], grpc.StatusCode.INVALID_ARGUMENT.name
        self._metrics.answered(name, outcome, 0.0)
        log.info("answered", request_id=NO_REQUEST_ID, method=name, outcome=outcome, seconds=0.0)
        await abort_undecodable(method, context)
