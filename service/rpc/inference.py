"""The handlers of the inference and model services.

Owns reading requests, writing responses, and aborting a stream that its client does not read. Every
handler runs inside `call_scope`. Knows nothing of how the server starts or stops.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
import structlog
from structlog.contextvars import bind_contextvars

from a2sf.errors import InvalidArgument
from a2sf.requests import Delta, Event, Finished, GenerationRequest, Started
from service.backend.runner import RequestFailed
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.rpc.conversions import descriptions, requests, responses
from service.rpc.lifecycle import Backend, CallKind, CallState, call_scope
from service.rpc.stall import stream_writer

log = structlog.get_logger(__name__)


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Generates completions and tokenizes prompts."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    # Uses `context.write` instead of a generator: when a client leaves, grpc leaves a generator
    # suspended, and then its `finally`, which frees the row, may run at any later time.
    async def StreamGenerate(  # type: ignore[override]  # noqa: N802
        self,
        request: pb.StreamGenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """See the proto."""
        async with call_scope(
            "StreamGenerate", self._backend, context, CallKind.COMPLETION
        ) as call:
            generation, builder = await self._read(request.input, call)
            limit_s = self._backend.options.stall_timeout_s
            async with (
                aclosing(self._events(generation, call)) as events,
                stream_writer(context, limit_s) as writer,
            ):
                async for event in events:
                    await writer.write(builder.stream_response(event))

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GenerateResponse:
        """See the proto."""
        response = pb.GenerateResponse()
        text: list[str] = []
        async with call_scope("Generate", self._backend, context, CallKind.COMPLETION) as call:
            generation, builder = await self._read(request.input, call)
            async with aclosing(self._events(generation, call)) as events:
                async for event in events:
                    match event:
                        case Started():
                            response.started.CopyFrom(builder.started(event))
                        case Delta():
                            delta = builder.delta(event)
                            text.append(delta.text)
                            response.token_ids.extend(delta.token_ids)
                            response.logprobs.extend(delta.logprobs)
                        case Finished():
                            response.finished.CopyFrom(responses.finished_message(event))
            response.text = "".join(text)
        return response

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        """See the proto."""
        response = pb.TokenizeResponse()
        async with call_scope("Tokenize", self._backend, context, CallKind.COMPLETION):
            read = partial(
                requests.read_prompt,
                request,
                self._backend.core.model,
                self._backend.options.max_prompt_bytes,
                prefix="",
            )
            prompt = await self._backend.prepare(read)
            response.token_ids.extend(prompt.token_ids)
            response.text = prompt.text or ""
        return response

    async def _events(
        self, request: GenerationRequest, call: CallState
    ) -> AsyncGenerator[Event, None]:
        call.span.request(request, self._backend.core.model.identity.id)
        written: list[str] = []
        try:
            with requests.proto_fields():
                async with aclosing(self._backend.runner.stream(request)) as events:
                    async for event in events:
                        call.completion.event(event)
                        call.span.event(event)
                        if isinstance(event, Finished):
                            call.figures = _figures(event)
                        elif isinstance(event, Delta) and self._backend.options.log_prompts:
                            written.append(event.text)
                        yield event
        except RequestFailed:
            call.completion.failed()
            raise
        finally:
            # Also for a completion that failed or was left early: log the text so far.
            if written:
                log.info("completion", request_id=call.request_id, text="".join(written))

    async def _read(
        self, message: pb.GenerationInput, call: CallState
    ) -> tuple[GenerationRequest, responses.ResponseBuilder]:
        call.request_id = requests.valid_request_id(message) or call.request_id
        # For all later log lines of this call; each call has a separate context.
        bind_contextvars(request_id=call.request_id)
        options, core = self._backend.options, self._backend.core
        tables = core.tables.now

        def read() -> tuple[GenerationRequest, responses.ResponseBuilder]:
            request, prompt = requests.read_request(
                message,
                tables,
                core.model,
                request_id=call.request_id,
                max_prompt_bytes=options.max_prompt_bytes,
            )
            if options.log_prompts:
                log.info("prompt", request_id=call.request_id, text=prompt.decoded(core.model))
            return request, responses.ResponseBuilder(message.output, prompt, core.model)

        return await self._backend.prepare(read)


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Describes the model and the alpha tables."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        """See the proto."""
        response = pb.GetModelResponse()
        async with call_scope("GetModel", self._backend, context):
            response.CopyFrom(descriptions.model_message(self._backend.core, self._backend.options))
        return response

    async def ListAlphaTables(  # noqa: N802
        self, request: pb.ListAlphaTablesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListAlphaTablesResponse:
        """See the proto."""
        response = pb.ListAlphaTablesResponse()
        async with call_scope("ListAlphaTables", self._backend, context):
            store = self._backend.core.tables.now
            response.CopyFrom(descriptions.table_list_message(store))
        return response

    async def GetAlphaTable(  # noqa: N802
        self, request: pb.GetAlphaTableRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetAlphaTableResponse:
        """See the proto."""
        response = pb.GetAlphaTableResponse()
        async with call_scope("GetAlphaTable", self._backend, context):
            if not request.name:
                raise InvalidArgument("name", "missing; ListAlphaTables lists the names")
            table = self._backend.core.tables.now.lookup(request.name)
            response.CopyFrom(descriptions.table_message(table))
        return response


def _figures(event: Finished) -> dict[str, Any]:
    usage, timings = event.usage, event.timings
    return {
        "reason": event.reason.value,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "evicted_tokens": event.cache.evicted_tokens,
        "queue_s": round(timings.queue_s, 3),
        "prefill_s": round(timings.prefill_s, 3),
        "decode_s": round(timings.decode_s, 3),
    }
