"""The asyncio clients: one method per RPC, each with a timeout.

Owns only the methods; `service.client.sync` has the same ones for threads. Knows nothing of how a
call is made.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Unpack

from a2sf.schema import AlphaTable
from service.client import calls
from service.client.calls import DEFAULT_TIMEOUT_S, DESCRIBE_TIMEOUT_S
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
from service.client.transport import AsyncTransport


class Client(AsyncTransport):
    """A client of one server or several. Use it as an async context manager, or call `close`.

    `target` is HOST:PORT; a name with several addresses, dns:///NAME:PORT; or a list of addresses,
    IP:PORT,IP:PORT. Several servers take turns; servers that are not SERVING are skipped.
    Every method raises the error that the server raised, as a class of `a2sf.errors`, or
    `service.status.RemoteError` if the server failed or the deadline passed.
    """

    def stream_generate(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        max_new_tokens: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of a completion; `options` are those of `GenerationOptions`.

        To leave early, close the generator (`contextlib.aclosing`); that cancels the call.
        """
        call = calls.stream_generate(prompt, max_new_tokens, options)
        return self.stream(call, timeout_s)

    async def generate(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        max_new_tokens: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Return the whole completion; `options` are those of `GenerationOptions`."""
        return await self.unary(calls.generate(prompt, max_new_tokens, options), timeout_s)

    async def tokenize(
        self,
        prompt: str | Chat,
        *,
        special_tokens_in_content: bool = False,
        timeout_s: float = DESCRIBE_TIMEOUT_S,
    ) -> TokenizedPrompt:
        """Return the text and token ids of `prompt`, as a completion would read it."""
        call = calls.tokenize(prompt, special_tokens_in_content)
        return await self.unary(call, timeout_s)

    async def get_model(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> ModelDescription:
        """Describe the model and the server's sizes."""
        return await self.unary(calls.get_model(), timeout_s)

    async def list_alpha_tables(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> TableListing:
        """List the server's alpha tables."""
        return await self.unary(calls.list_alpha_tables(), timeout_s)

    async def get_alpha_table(
        self, name: str, *, timeout_s: float = DESCRIBE_TIMEOUT_S
    ) -> AlphaTable:
        """Fetch one alpha table and check its digest."""
        return await self.unary(calls.get_alpha_table(name), timeout_s)


class AdminClient(AsyncTransport):
    """A client of one server's admin port, which needs a separate token.

    Changes apply to that server only, so a list of several servers is refused.
    """

    _balanced = False

    async def activate_alpha_table(
        self, name: str | None, *, etag: str, timeout_s: float = DESCRIBE_TIMEOUT_S
    ) -> Activated:
        """Make `name` the table for requests that name no method; None: no table.

        `etag` must come from the listing on which the caller decided. Raises Conflict if the tables
        have changed since.
        """
        return await self.unary(calls.activate_alpha_table(name, etag), timeout_s)

    async def reload_alpha_tables(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> Reloaded:
        """Make the server read its directory of tables again."""
        return await self.unary(calls.reload_alpha_tables(), timeout_s)

    async def abort_requests(
        self,
        request_ids: Sequence[str] = (),
        *,
        all_requests: bool = False,
        timeout_s: float = DESCRIBE_TIMEOUT_S,
    ) -> tuple[str, ...]:
        """Abort requests, the named ones or all; return the ids of those that were under way."""
        return await self.unary(calls.abort_requests(request_ids, all_requests), timeout_s)

    async def get_load(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> Load:
        """Return the server's current load."""
        return await self.unary(calls.get_load(), timeout_s)
