"""What goes into the engine and what comes out: the values that cross its front door.

Owns the request, the stream's events and the figures in them, all frozen. Knows nothing of
tensors or of transport; the service converts these to and from messages.
"""

import enum
from typing import Annotated

from pydantic import Field

from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.schema import AlphaTable, Count, Frozen, Positive

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 128


class Sampling(Frozen):
    """How the next token is drawn. Filters apply in the order of the fields here."""

    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    """0 is greedy: the most likely token, the lowest id on a tie."""
    top_k: Count = 0
    """Draw from the k most likely tokens; 0 means all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = 0.0
    """Leave out tokens less likely than this share of the most likely one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """None lets the engine choose one; the stream's first event tells which."""


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class GenerationRequest(Frozen):
    """One completion to make. `table` is the alpha table that the policy names, looked up."""

    request_id: str
    prompt_ids: Annotated[tuple[Count, ...], Field(min_length=1)]
    max_new_tokens: Positive
    sampling: Sampling = Sampling()
    stop: Annotated[tuple[StopString, ...], Field(max_length=MAX_STOP_STRINGS)] = ()
    """Strings that end the completion and are left out of its text."""
    stop_token_ids: Annotated[tuple[Count, ...], Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    """Tokens that end the completion and are left out of its text."""
    ignore_eos: bool = False
    cache_policy: CachePolicy = CachePolicy()
    table: AlphaTable | None = None


class FinishReason(enum.Enum):
    """Why a stream ended in the ordinary way. Failures are errors, never a reason."""

    LENGTH = "length"
    STOP = "stop"
    END_OF_SEQUENCE = "end_of_sequence"


class Usage(Frozen):
    """Tokens read and written."""

    prompt_tokens: Count
    completion_tokens: Count


class CacheStatistics(Frozen):
    """What the row held when it ended, read off the tensors themselves."""

    budget: Positive
    """Slots of the row, for each layer and head."""
    kept_tokens: Count
    """Tokens stored at the end, for each layer and head."""
    evicted_tokens: Count
    """Tokens dropped on the way, for each layer and head."""
    kv_bytes: Count
    """Bytes of the row's slots: keys, values, positions and scores."""
    kv_bytes_full: Count
    """Bytes of keys and values that a cache without eviction would hold now."""


class Timings(Frozen):
    """Seconds on the engine's clock."""

    queue_s: float
    """From submission to the start of the prefill."""
    prefill_s: float
    """From there to the first token."""
    decode_s: float
    """From the first token to the last."""


class Started(Frozen):
    """The first event: the request was admitted, under this very policy and seed."""

    request_id: str
    policy: EffectivePolicy
    prompt_tokens: Positive
    seed: Count


class Delta(Frozen):
    """What one decode step added. `text` ends at a character's boundary and may be empty."""

    request_id: str
    text: str
    token_ids: tuple[Count, ...]


class Finished(Frozen):
    """The last event of a stream that did not fail."""

    request_id: str
    reason: FinishReason
    matched_stop: str | None
    """The stop string that ended the stream, where one did."""
    usage: Usage
    cache: CacheStatistics
    timings: Timings


Event = Started | Delta | Finished
