"""The client: one method for each RPC, typed results, errors of the project's own tree.

Owns the channel, a deadline on every call, and cancelling a stream that is left early (grpc does
not: the server would work on for nobody). Knows nothing of the server's insides. Run as a program
(`python -m service.client "prompt"`) it is the command line of `service.client_cli`.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, Unpack

import grpc

from a2sf.schema import AlphaTable
from service import client_conversions as conversions
from service.client_conversions import GenerationOptions, generation_input
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.results import Completion, ModelDescription, StreamEvent, TableListing
from service.status import from_wire

DEFAULT_TIMEOUT_S = 300.0
"""Deadline of a completion, in seconds."""

DESCRIBE_TIMEOUT_S = 10.0
"""Deadline of the calls that only look something up, in seconds."""


class Client:
    """A client of one server. Use it as an async context manager, or call `close`.

    Every method raises the error that the server raised, as a class of `a2sf.errors`, or
    `service.status.RemoteError` where the server failed or the deadline passed.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._inference = pb_grpc.InferenceServiceStub(self._channel)
        self._model = pb_grpc.ModelServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close(None)

    async def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield a completion as it grows; `options` are those of `GenerationOptions`.

        To leave early, close the generator (`contextlib.aclosing`): that cancels the call.
        """
        request = pb.StreamGenerateRequest(input=generation_input(prompt, max_new_tokens, options))
        call = self._inference.StreamGenerate(request, timeout=timeout_s)
        name = ""
        try:
            async with _own_errors(timeout_s):
                async for response in call:
                    event = conversions.stream_event(response, name)
                    if event is not None:
                        name = event.request_id
                        yield event
        finally:
            call.cancel()

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Return a whole completion; `options` are those of `GenerationOptions`."""
        request = pb.GenerateRequest(input=generation_input(prompt, max_new_tokens, options))
        async with _own_errors(timeout_s):
            return conversions.completion(
                await self._inference.Generate(request, timeout=timeout_s)
            )

    async def get_model(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> ModelDescription:
        """Describe what the server serves."""
        async with _own_errors(timeout_s):
            response = await self._model.GetModel(pb.GetModelRequest(), timeout=timeout_s)
        return conversions.model_description(response)

    async def list_alpha_tables(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> TableListing:
        """List the server's alpha tables."""
        request = pb.ListAlphaTablesRequest()
        async with _own_errors(timeout_s):
            response = await self._model.ListAlphaTables(request, timeout=timeout_s)
        return conversions.table_listing(response)

    async def get_alpha_table(
        self, name: str, *, timeout_s: float = DESCRIBE_TIMEOUT_S
    ) -> AlphaTable:
        """Fetch one alpha table, its digest checked."""
        request = pb.GetAlphaTableRequest(name=name)
        async with _own_errors(timeout_s):
            response = await self._model.GetAlphaTable(request, timeout=timeout_s)
        return conversions.alpha_table(response)


@asynccontextmanager
async def _own_errors(timeout_s: float) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_wire(error, timeout_s) from error


def main() -> None:
    """Run the client's command line."""
    # Here, because the command line imports this module.
    from service.client_cli import app

    app(prog_name="a2sf-client")


if __name__ == "__main__":
    main()
