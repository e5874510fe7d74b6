"""What a client gets: the values that the wire's answers become.

Owns only those that the core has no value for; `Delta` and `Finished` are the core's own. Knows
nothing of messages.
"""

from typing import TypeAlias

from a2sf.policy import CachePolicy
from a2sf.requests import Delta, Finished
from a2sf.schema import Frozen, ModelIdentity


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
    """Tokens that each head keeps, the mean over layers."""
    layer_budgets: tuple[int, ...]
    """[layers] tokens that each head keeps."""
    recent: int
    """Tokens before the newest that a layer of `budget` would never forget."""
    layer_recents: tuple[int, ...]
    """[layers] tokens before the newest that are never forgotten."""
    sinks: int
    """First tokens that are never forgotten."""
    prefill_chunk: int
    """Tokens of one prompt block; 0 for one block."""
    random_seed: int | None


StreamEvent: TypeAlias = StreamStarted | Delta | Finished


class Completion(Frozen):
    """A whole completion."""

    started: StreamStarted
    text: str
    token_ids: tuple[int, ...]
    """Empty unless asked for."""
    finished: Finished


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
    """The largest budget, in tokens: the mean over layers, where the default table shapes rows."""
    max_batch: int
    """Requests that decode together at most."""
    kv_slab_bytes: int
    default_cache_policy: CachePolicy
    server_version: str


class TableListing(Frozen):
    """The tables of a server: digests of those served and reasons of those refused, by name."""

    served: dict[str, str]
    refused: dict[str, str]
