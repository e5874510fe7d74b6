"""The blocking clients for threads, with the same methods as `service.client`'s.

Owns only the methods; requests and responses are handled by the same code. Knows nothing of
asyncio.
"""

from collections.abc import Generator, Sequence
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
from service.client.transport import SyncTransport


class SyncClient(SyncTransport):
    """A client of one server or several, like `service.client.Client`; a context manager."""

    def stream_generate(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        max_new_tokens: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[GenerationOptions],
    ) -> Generator[StreamEvent, None, None]:
        """Yield the events of a completion; `options` are those of `GenerationOptions`.

        To leave early, close the generator (`contextlib.closing`); that cancels the call.
        """
        call = calls.stream_generate(prompt, max_new_tokens, options)
        return self.stream(call, timeout_s)

    def generate(
        self,
        prompt: str | Sequence[int] | Chat,
        *,
        max_new_tokens: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Return the whole completion; `options` are those of `GenerationOptions`."""
        return self.unary(calls.generate(prompt, max_new_tokens, options), timeout_s)

    def tokenize(
        self,
        prompt: str | Chat,
        *,
        special_tokens_in_content: bool = False,
        timeout_s: float = DESCRIBE_TIMEOUT_S,
    ) -> TokenizedPrompt:
        """Return the text and token ids of `prompt`, as a completion would read it."""
        call = calls.tokenize(prompt, special_tokens_in_content)
        return self.unary(call, timeout_s)

    def get_model(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> ModelDescription:
        """Describe the model and the server's sizes."""
        return self.unary(calls.get_model(), timeout_s)

    def list_alpha_tables(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> TableListing:
        """List the server's alpha tables."""
        return self.unary(calls.list_alpha_tables(), timeout_s)

    def get_alpha_table(self, name: str, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> AlphaTable:
        """Fetch one alpha table and check its digest."""
        return self.unary(calls.get_alpha_table(name), timeout_s)


class SyncAdminClient(SyncTransport):
    """A client of one server's admin port, like `service.client.AdminClient`."""

    _balanced = False

    def activate_alpha_table(
        self, name: str | None, *, etag: str, timeout_s: float = DESCRIBE_TIMEOUT_S
    ) -> Activated:
        """Make `name` the table for requests that name no method; None: no table.

        `etag` must come from the listing on which the caller decided. Raises Conflict if the tables
        have changed since.
        """
        return self.unary(calls.activate_alpha_table(name, etag), timeout_s)

    def reload_alpha_tables(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> Reloaded:
        """Make the server read its directory of tables again."""
        return self.unary(calls.reload_alpha_tables(), timeout_s)

    def abort_requests(
        self,
        request_ids: Sequence[str] = (),
        *,
        all_requests: bool = False,
        timeout_s: float = DESCRIBE_TIMEOUT_S,
    ) -> tuple[str, ...]:
        """Abort requests, the named ones or all; return the ids of those that were under way."""
        return self.unary(calls.abort_requests(request_ids, all_requests), timeout_s)

    def get_load(self, *, timeout_s: float = DESCRIBE_TIMEOUT_S) -> Load:
        """Return the server's current load."""
        return self.unary(calls.get_load(), timeout_s)
