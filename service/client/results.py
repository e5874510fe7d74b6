"""What a client gets: the values that the wire's answers become.

Owns only those that the core has no value for; `Finished` is the core's own, and `Delta` is the
core's with more told of each token. Knows nothing of messages.
"""

from datetime import datetime
from typing import TypeAlias

from a2sf import requests
from a2sf.policy import CachePolicy, Heads
from a2sf.requests import Finished
from a2sf.schema import Frozen, ModelIdentity


class Prompt(Frozen):
    """A prompt as the model reads it."""

    text: str
    """As given, as the chat template made it, or decoded from the token ids given."""
    token_ids: tuple[int, ...]


class TokenizedPrompt(Prompt):
    """The token ids that a completion of the same prompt would read."""


class StreamStarted(Frozen):
    """The first event: the request was admitted, under this policy and seed."""

    request_id: str
    prompt_tokens: int
    seed: int
    method: str
    """A preset's name, `a2sf` for one alpha everywhere, or `table`."""
    alpha: float | None
    """The one forgetting factor, for method a2sf."""
    table_name: str | None
    table_sha256: str | None
    budget: int
    """Tokens that each head keeps, the mean over layers and heads."""
    head_budgets: Heads
    """[layers][KV heads] tokens that each keeps."""
    min_budget: int | None
    """The floor that raised `budget`, where a ratio came to fewer tokens."""
    recent: int
    """Tokens before the newest that a head of `budget` would never forget."""
    head_recents: Heads
    """[layers][KV heads] tokens before the newest that each never forgets."""
    sinks: int
    """First tokens that are never forgotten."""
    prefill_chunk: int
    """Tokens of one prompt block; 0 for one block."""
    random_seed: int | None
    prompt: Prompt | None
    """The prompt as it was read, where `echo` asked for it."""


class TokenLogprob(requests.TokenLogprob):
    """One token, its probability's natural logarithm, and what it alone reads as."""

    text: str
    """U+FFFD where the token is only part of a character."""


class TokenLogprobs(requests.TokenLogprobs):
    """How likely the model found a token of the completion, and what it found most likely."""

    token_id: int
    text: str
    """What the token alone reads as; U+FFFD where it is only part of a character."""
    top: tuple[TokenLogprob, ...]


class Delta(requests.Delta):
    """What the completion grew by. `text` ends at a character's boundary and may be empty."""

    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token, where asked for; without `token_ids`, these name them."""


StreamEvent: TypeAlias = StreamStarted | Delta | Finished


class Completion(Frozen):
    """A whole completion."""

    started: StreamStarted
    text: str
    token_ids: tuple[int, ...]
    """Empty unless asked for."""
    finished: Finished
    logprobs: tuple[TokenLogprobs, ...]
    """One for each token; empty unless asked for."""


class ModelDescription(Frozen):
    """What a server serves, and with how much room."""

    model: ModelIdentity
    max_context: int
    """Most tokens of prompt and completion together."""
    vocab_size: int
    head_dim: int
    dtype: str
    device: str
    slots: int
    """The largest budget, in tokens: the mean over heads, where the default table shapes rows."""
    max_batch: int
    """Requests that decode together at most."""
    kv_slab_bytes: int
    default_cache_policy: CachePolicy
    """That of a request that gives none."""
    server_version: str
    head_slots: Heads
    """[layers][KV heads] slots of a row; all are `slots` but where the default table deals
    unequally."""
    max_prefill_tokens: int
    """Longest prompt that is read in one block; longer ones need `prefill_chunk`."""
    chat: bool
    """Whether prompts may be chat messages."""
    max_waiting: int
    """Requests that may wait once `max_batch` decode."""
    max_prompt_bytes: int
    """Longest text of a prompt, in bytes of UTF-8; of chat messages, all of theirs together."""


class TableSummary(Frozen):
    """One alpha table, in short."""

    name: str
    sha256: str
    dataset: str
    verdict: str
    """`better` or `no_better_than_uniform`, as its file tells."""
    created_at: datetime


class TableListing(Frozen):
    """The tables of a server, by name, and which of them is the default."""

    tables: dict[str, TableSummary]
    """Those that a request may name."""
    refused: dict[str, str]
    """Why files are not served as they are now."""
    default_table: str | None
    """The table of requests that name no method; None: the server's default policy has one."""
    etag: str
    """Names this state; `activate_alpha_table` wants it back."""

    @property
    def served(self) -> dict[str, str]:
        """Digests of the tables that a request may name."""
        return {name: table.sha256 for name, table in self.tables.items()}


class Activated(Frozen):
    """Which table is the default now."""

    default_table: str | None
    etag: str


class Reloaded(Frozen):
    """What reading the directory of tables again has changed."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    refused: dict[str, str]
    """Reasons by name; what was served under such a name stays."""
    etag: str


class Load(Frozen):
    """How much of a server is taken at one moment."""

    running: int
    """Requests that hold a row or whose prompt is being read."""
    waiting: int
    """Requests that wait for a row."""
    admitted: int
    """Completions under way, those included whose last events have yet to be read."""
    capacity: int
    """The most completions that may be under way."""
    kv_bytes_used: int
    kv_bytes_limit: int
