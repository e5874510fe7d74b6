"""Requests that cannot be read, answered as what they are.

Owns one interceptor in front of our own services. By itself gRPC would answer UNKNOWN with the
text of the parser's exception. Knows nothing of what readable requests say.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from service.answering import SERVICE_OF, Backend, answering
from service.status import InvalidRequest

if TYPE_CHECKING:
    # Generic in the stubs alone.
    Handler = grpc.RpcMethodHandler[Any, Any]


class _Unreadable:
    """Stands for a request that the parser refused."""


class Decoding(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses undecodable requests to our services as INVALID_ARGUMENT."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler":
        """Put the check around the handler, where there is one and it is ours."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.rpartition("/")[2]
        ours = f"/{SERVICE_OF.get(method)}/{method}" == handler_call_details.method
        if handler is None or not ours:
            return handler
        streams = handler.response_streaming
        behaviour: Any = handler.unary_stream if streams else handler.unary_unary
        decode = handler.request_deserializer
        assert decode is not None, "the generated code decodes"

        def read(message: bytes) -> Any:
            try:
                return decode(message)
            except DecodeError:
                return _Unreadable()

        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if not isinstance(request, _Unreadable):
                return await behaviour(request, context)
            async with answering(method, self._backend, context):
                raise InvalidRequest(
                    [
                        (
                            "request",
                            f"cannot be read: the message of {method} is cut short, is none of "
                            "Protocol Buffers, or has a string that is not UTF-8",
                        )
                    ]
                )

        rebuild: Any = (
            grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        )
        rebuilt: Handler = rebuild(answer, read, handler.response_serializer)
        return rebuilt
