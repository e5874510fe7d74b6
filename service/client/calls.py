"""Describes each RPC as a value: the request, the method, and how to read the response.

Owns what the asyncio and the threaded clients share, which is everything except waiting. Knows
nothing of channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from a2sf.errors import InvalidArgument
from a2sf.schema import AlphaTable
from service.client import requests, responses
from service.client.requests import Chat, GenerationOptions
from service.client.results import (
    Activated,
    Completion,
    Load,
    ModelDescription,
    Reloaded,
    StreamEvent,
    TableListing,
    TokenizedPrompt,
)
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc

DEFAULT_TIMEOUT_S = 300.0
"""Default deadline of a completion, in seconds."""

DESCRIBE_TIMEOUT_S = 10.0
"""Default deadline of the other calls, in seconds."""

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """One call, made once. `read` converts its response, or each event of it, to a result."""

    stub: type
    method: str
    request: Message
    read: Callable[[Any], T_co]
    changes_server: bool = False
    """Whether a lost answer leaves open what the server did, so that only the caller may repeat the
    call."""


def stream_generate(
    prompt: str | Sequence[int] | Chat, max_new_tokens: int, options: GenerationOptions
) -> Call[StreamEvent | None]:
    """Build the call of a streamed completion; an unknown kind of event reads as None."""
    request = pb.StreamGenerateRequest(
        input=requests.generation_input(prompt, max_new_tokens, options)
    )
    name = ""

    def read(message: pb.StreamGenerateResponse) -> StreamEvent | None:
        nonlocal name
        event = responses.stream_event(message, name)
        # Only the first event carries the request id.
        name = event.request_id if event is not None else name
        return event

    return Call(pb_grpc.InferenceServiceStub, "StreamGenerate", request, read)


def generate(
    prompt: str | Sequence[int] | Chat, max_new_tokens: int, options: GenerationOptions
) -> Call[Completion]:
    """Build the call of a whole completion."""
    request = pb.GenerateRequest(input=requests.generation_input(prompt, max_new_tokens, options))
    return Call(pb_grpc.InferenceServiceStub, "Generate", request, responses.completion)


def tokenize(prompt: str | Chat, special_tokens_in_content: bool) -> Call[TokenizedPrompt]:
    """Build the call that tokenizes a prompt."""
    request = requests.tokenize_request(prompt, special_tokens_in_content)
    return Call(pb_grpc.InferenceServiceStub, "Tokenize", request, responses.tokenized_prompt)


def get_model() -> Call[ModelDescription]:
    """Build the call that describes the model and the server's sizes."""
    request = pb.GetModelRequest()
    return Call(pb_grpc.ModelServiceStub, "GetModel", request, responses.model_description)


def list_alpha_tables() -> Call[TableListing]:
    """Build the call that lists the tables."""
    request = pb.ListAlphaTablesRequest()
    return Call(pb_grpc.ModelServiceStub, "ListAlphaTables", request, responses.table_listing)


def get_alpha_table(name: str) -> Call[AlphaTable]:
    """Build the call that fetches one table."""
    request = pb.GetAlphaTableRequest(name=name)
    return Call(pb_grpc.ModelServiceStub, "GetAlphaTable", request, responses.alpha_table)


def activate_alpha_table(name: str | None, etag: str) -> Call[Activated]:
    """Build the call that changes the default table."""
    request = pb.ActivateAlphaTableRequest(name=name or "", etag=etag)
    return Call(
        pb_grpc.AdminServiceStub,
        "ActivateAlphaTable",
        request,
        responses.activated,
        changes_server=True,
    )


def reload_alpha_tables() -> Call[Reloaded]:
    """Build the call that reloads the directory of tables."""
    request = pb.ReloadAlphaTablesRequest()
    return Call(
        pb_grpc.AdminServiceStub,
        "ReloadAlphaTables",
        request,
        responses.reloaded,
        changes_server=True,
    )


def abort_requests(request_ids: Sequence[str], all_requests: bool) -> Call[tuple[str, ...]]:
    """Build the call that aborts requests."""
    if isinstance(request_ids, str):
        # A string is a sequence too, but of one-character ids.
        raise InvalidArgument("request_ids", "one string; give a list of ids")
    request = pb.AbortRequestsRequest(request_ids=request_ids, all=all_requests)
    return Call(
        pb_grpc.AdminServiceStub,
        "AbortRequests",
        request,
        lambda message: tuple(message.request_ids),
        changes_server=True,
    )


def get_load() -> Call[Load]:
    """Build the call that returns the current load."""
    request = pb.GetLoadRequest()
    return Call(pb_grpc.AdminServiceStub, "GetLoad", request, responses.load)
