"""The handlers of the admin service, which change the served tables and abort requests.

Owns reading their requests and writing the responses. Authorisation happens before. Knows nothing
of files or of the engine.
"""

import asyncio
from dataclasses import asdict
from typing import Any

import grpc

from a2sf.errors import InvalidArgument
from service.backend.default_table import log_default_policy
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.conversions.descriptions import refused_messages
from service.rpc.lifecycle import Backend, CallKind, call_scope


class AdminServicer(pb_grpc.AdminServiceServicer):
    """Changes tables, aborts requests, and reports load."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def ActivateAlphaTable(  # noqa: N802
        self,
        request: pb.ActivateAlphaTableRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ActivateAlphaTableResponse:
        """See the proto."""
        response = pb.ActivateAlphaTableResponse()
        async with call_scope("ActivateAlphaTable", self._backend, context, CallKind.ADMIN):
            # In a thread, because another thread may hold the catalog's lock while it reads files.
            store = await asyncio.to_thread(
                self._backend.core.tables.activate, request.name, request.etag
            )
            log_default_policy(self._backend.core.config, store)
            response.default_table = store.default or ""
            response.etag = store.etag
        return response

    async def ReloadAlphaTables(  # noqa: N802
        self,
        request: pb.ReloadAlphaTablesRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ReloadAlphaTablesResponse:
        """See the proto."""
        response = pb.ReloadAlphaTablesResponse()
        async with call_scope("ReloadAlphaTables", self._backend, context, CallKind.ADMIN):
            reloaded = await self._backend.reload_tables()
            response.added.extend(reloaded.added)
            response.changed.extend(reloaded.changed)
            response.removed.extend(reloaded.removed)
            response.refused.extend(refused_messages(reloaded.refused))
            response.etag = reloaded.etag
        return response

    async def AbortRequests(  # noqa: N802
        self, request: pb.AbortRequestsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.AbortRequestsResponse:
        """See the proto."""
        response = pb.AbortRequestsResponse()
        async with call_scope("AbortRequests", self._backend, context, CallKind.ADMIN) as call:
            if request.all == bool(request.request_ids):
                raise InvalidArgument("request_ids", "give either request ids or all")
            ended = self._backend.runner.abort(None if request.all else request.request_ids)
            response.request_ids.extend(ended)
            call.figures = {"aborted": len(ended)}
        return response

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetLoadResponse:
        """See the proto."""
        response = pb.GetLoadResponse()
        async with call_scope("GetLoad", self._backend, context, CallKind.ADMIN):
            response.CopyFrom(pb.GetLoadResponse(**asdict(self._backend.load)))
        return response
