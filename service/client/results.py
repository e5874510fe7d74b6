"""Results of the client: the values that responses are converted to.

Owns only values that the core does not have; `Finished` is the core's class, and `Delta` extends
the core's with more data per token. Knows nothing of messages.
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
    """As given, as the chat template rendered it, or decoded from the given token ids."""
    token_ids: tuple[int, ...]


class TokenizedPrompt(Prompt):
    """The prompt as a completion would read it."""


class StreamStarted(Frozen):
    """The first event: the request was admitted with this policy and seed."""

    request_id: str
    prompt_tokens: int
    seed: int
    method: str
    """Name of a preset, `a2sf` for one alpha everywhere, or `table`."""
    alpha: float | None
    """The forgetting factor of method a2sf."""
    table_name: str | None
    table_sha256: str | None
    budget: int
    """Tokens that each head keeps, averaged over layers and heads."""
    head_budgets: Heads
    """[layers][KV heads] tokens that each head keeps."""
    min_budget: int | None
    """The lower bound that raised `budget`, if a ratio gave fewer tokens."""
    recent: int
    """Tokens before the newest that a head with `budget` never evicts."""
    head_recents: Heads
    """[layers][KV heads] tokens before the newest that each head never evicts."""
    sinks: int
    """First tokens that are never evicted."""
    prefill_chunk: int
    """Tokens per prompt block; 0 for one block."""
    random_seed: int | None
    prompt: Prompt | None
    """The prompt as the model read it, if `echo` was set."""


class TokenLogprob(requests.TokenLogprob):
    """A token, its log-probability (natural logarithm), and its text."""

    text: str
    """Text of this token alone; U+FFFD if it is only part of a character."""


class TokenLogprobs(requests.TokenLogprobs):
    """The log-probability of a token of the completion, and the most likely tokens at its step."""

    token_id: int
    text: str
    """Text of this token alone; U+FFFD if it is only part of a character."""
    top: tuple[TokenLogprob, ...]


class Delta(requests.Delta):
    """New text and tokens. `text` ends at a character boundary and may be empty."""

    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each new token, if requested; they carry token ids even without `token_ids`."""


StreamEvent: TypeAlias = StreamStarted | Delta | Finished


class Completion(Frozen):
    """A whole completion."""

    started: StreamStarted
    text: str
    token_ids: tuple[int, ...]
    """Empty unless requested."""
    finished: Finished
    logprobs: tuple[TokenLogprobs, ...]
    """One for each token; empty unless requested."""


class ModelDescription(Frozen):
    """The model of a server, and the server's sizes."""

    model: ModelIdentity
    max_context: int
    """The most tokens of prompt and completion together."""
    vocab_size: int
    head_dim: int
    dtype: str
    device: str
    slots: int
    """The largest budget in tokens; an average over heads if the default table shapes rows."""
    max_batch: int
    """The most requests that decode together."""
    kv_slab_bytes: int
    default_cache_policy: CachePolicy
    """Policy of a request that sets none."""
    server_version: str
    head_slots: Heads
    """[layers][KV heads] slots of a row; all equal `slots`, unless the default table splits them
    unequally."""
    max_prefill_tokens: int
    """Longest prompt that fits into one block; longer ones need `prefill_chunk`."""
    chat: bool
    """Whether prompts may be chat messages."""
    max_waiting: int
    """Requests that may wait while `max_batch` requests decode."""
    max_prompt_bytes: int
    """Longest text of a prompt, in bytes of UTF-8; for a chat, the sum over its messages."""


class TableSummary(Frozen):
    """Summary of one alpha table."""

    name: str
    sha256: str
    dataset: str
    verdict: str
    """`better` or `no_better_than_uniform`, from the table's file."""
    created_at: datetime


class TableListing(Frozen):
    """The tables of a server, by name, and its default table."""

    tables: dict[str, TableSummary]
    """Tables that a request may name."""
    refused: dict[str, str]
    """Why files are not served in their present state."""
    default_table: str | None
    """Table for requests that name no method; None: the server's default policy applies."""
    etag: str
    """Identifies this state; pass it to `activate_alpha_table`."""

    @property
    def served(self) -> dict[str, str]:
        """Digests of the tables that a request may name."""
        return {name: table.sha256 for name, table in self.tables.items()}


class Activated(Frozen):
    """The new default table."""

    default_table: str | None
    etag: str


class Reloaded(Frozen):
    """The changes of a reload."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    refused: dict[str, str]
    """Reasons by name; what was served under such a name is still served."""
    etag: str


class Load(Frozen):
    """Load of a server at one moment."""

    running: int
    """Requests that hold a row or are in prefill."""
    waiting: int
    """Requests that wait for a row."""
    admitted: int
    """Completions under way, including those whose last events are still unread."""
    capacity: int
    """The most completions that may be under way."""
    kv_bytes_used: int
    kv_bytes_limit: int
