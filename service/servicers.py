"""The handlers of both services: read, ask the engine, answer.

Owns the course of a call and what is logged of it: one line at its end, with the request id and
figures, never with text. Every handler runs inside `answering`, which holds the gate, turns
errors into statuses and lets nothing else out. Knows nothing of how the server starts or stops.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from a2sf import __version__
from a2sf.errors import InvalidArgument
from a2sf.requests import Delta, Event, Finished, GenerationRequest, Started
from service import conversions
from service.core import Core
from service.gate import Gate
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.policies import policy_from_message, policy_to_message
from service.runner import EngineRunner
from service.status import to_wire

log = logging.getLogger(__name__)


class Backend:
    """What the handlers share: the gate, the runner, and the core once it is loaded."""

    def __init__(self, gate: Gate, runner: EngineRunner) -> None:
        self.gate = gate
        self.runner = runner
        self._core: Core | None = None

    @property
    def core(self) -> Core:
        """The loaded core; there is one before the gate opens."""
        assert self._core is not None, "the gate opens only once the core is loaded"
        return self._core

    @core.setter
    def core(self, core: Core) -> None:
        self._core = core


@dataclass
class _Call:
    """One call's name and figures, for the log and for the status of a failure."""

    request_id: str = "-"
    outcome: str = "ok"
    figures: str = ""


@asynccontextmanager
async def answering(
    method: str, backend: Backend, context: grpc.aio.ServicerContext[Any, Any]
) -> AsyncIterator[_Call]:
    call = _Call()
    try:
        with backend.gate.enter():
            yield call
    except asyncio.CancelledError:
        # The client left, or its deadline passed: which of the two is not told here.
        call.outcome = "cancelled"
        raise
    except Exception as error:
        status = to_wire(error, call.request_id)
        call.outcome = status.code.name
        await context.abort(status.code, status.details, status.trailers)
    finally:
        log.info(
            "request_id=%s method=%s outcome=%s%s",
            *(call.request_id, method, call.outcome, call.figures),
        )


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Makes completions."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    # Written with `context.write` rather than as a generator: grpc leaves a generator suspended
    # when the client goes away, and then nothing says when its `finally` frees the row.
    async def StreamGenerate(  # type: ignore[override]  # noqa: N802
        self,
        request: pb.StreamGenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """See the proto."""
        async with (
            answering("StreamGenerate", self._backend, context) as call,
            aclosing(self._events(request.input, call)) as events,
        ):
            async for event in events:
                await context.write(conversions.stream_response(event, request.input.output))

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GenerateResponse:
        """See the proto."""
        response = pb.GenerateResponse()
        text: list[str] = []
        async with (
            answering("Generate", self._backend, context) as call,
            aclosing(self._events(request.input, call)) as events,
        ):
            async for event in events:
                match event:
                    case Started():
                        response.started.CopyFrom(conversions.started_message(event))
                    case Delta():
                        text.append(event.text)
                        if request.input.output.token_ids:
                            response.token_ids.extend(event.token_ids)
                    case Finished():
                        response.finished.CopyFrom(conversions.finished_message(event))
            response.text = "".join(text)
        return response

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        """See the proto."""
        response = pb.TokenizeResponse()
        async with answering("Tokenize", self._backend, context):
            ids = await asyncio.to_thread(self._backend.core.model.encode, request.text)
            response.token_ids.extend(ids)
            response.text = request.text
        return response

    async def _events(
        self, message: pb.GenerationInput, call: _Call
    ) -> AsyncGenerator[Event, None]:
        call.request_id = conversions.request_id(message)
        request = await self._read(message, call.request_id)
        with conversions.proto_fields():
            async with aclosing(self._backend.runner.stream(request)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        call.figures = _figures(event)
                    yield event

    async def _read(self, message: pb.GenerationInput, name: str) -> GenerationRequest:
        core = self._backend.core
        policy = policy_from_message(message.cache_policy, "input.cache_policy")
        method = policy if policy.names_method else core.config.default_policy
        table = core.tables.lookup(method.table) if method.table is not None else None
        prompt = conversions.prompt(message)
        if isinstance(prompt, str):
            # A long text takes its time, and the loop answers health checks meanwhile.
            prompt = await asyncio.to_thread(core.model.encode, prompt)
        return conversions.generation_request(
            message, name=name, prompt_ids=prompt, policy=policy, table=table
        )


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Tells what is being served."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        """See the proto."""
        response = pb.GetModelResponse()
        async with answering("GetModel", self._backend, context):
            response.CopyFrom(describe(self._backend.core))
        return response

    async def ListAlphaTables(  # noqa: N802
        self, request: pb.ListAlphaTablesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListAlphaTablesResponse:
        """See the proto."""
        response = pb.ListAlphaTablesResponse()
        async with answering("ListAlphaTables", self._backend, context):
            tables = self._backend.core.tables
            response.CopyFrom(conversions.table_list_message(tables.tables, tables.refused))
        return response

    async def GetAlphaTable(  # noqa: N802
        self, request: pb.GetAlphaTableRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetAlphaTableResponse:
        """See the proto."""
        response = pb.GetAlphaTableResponse()
        async with answering("GetAlphaTable", self._backend, context):
            if not request.name:
                raise InvalidArgument("name", "missing; ListAlphaTables tells the names")
            table = self._backend.core.tables.lookup(request.name)
            response.CopyFrom(conversions.table_message(table))
        return response


def describe(core: Core) -> pb.GetModelResponse:
    """Write what is being served."""
    shape = core.model.shape
    return pb.GetModelResponse(
        model=conversions.identity_message(core.model.identity),
        max_context=shape.max_context,
        vocab_size=shape.vocab_size,
        head_dim=shape.head_dim,
        dtype=str(core.model.dtype).removeprefix("torch."),
        device=core.model.device.type,
        slots=core.config.slots,
        max_batch=core.config.max_batch,
        kv_slab_bytes=core.engine.kv_slab_bytes,
        default_cache_policy=policy_to_message(core.config.default_policy),
        server_version=__version__,
    )


def _figures(event: Finished) -> str:
    return (
        f" reason={event.reason.value} prompt_tokens={event.usage.prompt_tokens}"
        f" completion_tokens={event.usage.completion_tokens}"
        f" evicted_tokens={event.cache.evicted_tokens} queue_s={event.timings.queue_s:.3f}"
        f" prefill_s={event.timings.prefill_s:.3f} decode_s={event.timings.decode_s:.3f}"
    )
