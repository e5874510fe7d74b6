"""The engine's input and output: requests and events.

Owns the request, the events of a stream and the statistics in them; all are frozen. Knows nothing
of tensors or of transport; the service converts these values to and from messages.
"""

import enum
from typing import Annotated

from pydantic import Field, InstanceOf, ValidationInfo, field_validator

from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.schema import AlphaTable, Count, Frozen, Positive
from a2sf.validation import Given

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TOP_LOGPROBS = 20


class Sampling(Given):
    """Settings for drawing the next token. Filters apply in the order of these fields."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0, allow_inf_nan=False)] = 1.0
    """Divides the positive logits of tokens in the prompt or completion, and multiplies the
    negative ones. 1: no effect; above 1: less repetition. Applies to greedy decoding too."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    """0 is greedy: the most likely token; on a tie, the lowest id."""
    top_k: Count = 0
    """Draw from the k most likely tokens and all tokens tied with the k-th. 0: all tokens."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 1.0
    """Draw from the fewest tokens whose probabilities sum to top_p; on a tie, the lowest ids."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = 0.0
    """Drop tokens whose probability is below min_p times the highest probability."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """None: the engine chooses a seed and reports it in the stream's first event."""


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatMessage(Given):
    """One message of a conversation."""

    role: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]
    """The role, by the name in the model's template: `system`, `user`, `assistant`, ..."""
    content: str


class GenerationRequest(Frozen):
    """A request for one completion. `table` is the alpha table that the policy names."""

    request_id: str
    prompt_ids: Annotated[tuple[Count, ...], Field(min_length=1)]
    max_new_tokens: Positive
    min_new_tokens: Count = 0
    """The completion has at least this many tokens, at most max_new_tokens, unless the time limit
    ends it. Tokens that would end it are not drawn before, and a stop string counts only if a later
    token completes it."""
    priority: int = 0
    """The waiting request with the highest priority starts first; on a tie, the oldest. A lower one
    waits as long as higher ones arrive. Running requests are not interrupted."""
    time_limit_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Seconds from submission until the stream ends with the tokens that it has. The engine checks
    this at the start of a step. A request that is still waiting or has no token yet ends too, with
    `Started` and `Finished` like any other."""
    sampling: Sampling = Sampling()
    stop: Annotated[tuple[StopString, ...], Field(max_length=MAX_STOP_STRINGS)] = ()
    """Strings that end the completion and are left out of its text. A stop string that is the name
    of a special token also matches that token, which is never part of the text."""
    stop_token_ids: Annotated[tuple[Count, ...], Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    """Tokens that end the completion and are left out of its text."""
    turn_end_ids: tuple[Count, ...] = ()
    """Tokens that end an assistant turn. They end the completion like the model's end-of-sequence
    tokens."""
    ignore_eos: bool = False
    """Continue after turn_end_ids and the model's end-of-sequence tokens."""
    logprobs: bool = False
    """Return each token's logprob: the log-softmax of the raw logits, before any setting above."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    """Number of most likely tokens to return per step, with their logprobs; needs `logprobs`."""
    cache_policy: CachePolicy = CachePolicy()
    table: AlphaTable | None = None

    @field_validator("min_new_tokens")
    @classmethod
    def _within_the_most(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("max_new_tokens", value)
        if value > most:
            raise ValueError(f"{value}; accepted: 0 to max_new_tokens, {most}")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _logprobs_are_asked_for(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs", True):
            raise ValueError(f"{value} without logprobs; set logprobs too")
        return value


class FinishReason(enum.Enum):
    """Why a stream ended normally. A failure is a `Failed` event, not a reason."""

    LENGTH = "length"
    STOP = "stop"
    END_OF_SEQUENCE = "end_of_sequence"
    TIME_LIMIT = "time_limit"


class Usage(Frozen):
    """Number of prompt tokens and of generated tokens."""

    prompt_tokens: Count
    completion_tokens: Count


class CacheStatistics(Frozen):
    """The content of the row at the end, and its size in the cache."""

    budget: Positive
    """Slots of the row per head, averaged over layers and heads."""
    kept_tokens: Count
    """Tokens stored per head at the end, averaged over layers and heads, rounded."""
    evicted_tokens: Count
    """Tokens evicted per head: all tokens in the cache so far minus kept_tokens."""
    kv_bytes: Count
    """Bytes of the slots in use: keys, values, positions and scores of all layers."""
    kv_bytes_full: Count
    """Bytes of the keys and values in a cache without eviction."""


class Timings(Frozen):
    """Seconds on the engine's clock; 0 for a phase that the request did not reach."""

    queue_s: float
    """From submission to the start of the prefill."""
    prefill_s: float
    """From there to the first token."""
    decode_s: float
    """From the first token to the last."""


class Started(Frozen):
    """The first event: the request was admitted, with this policy and seed."""

    request_id: str
    policy: EffectivePolicy
    prompt_tokens: Positive
    seed: Count


class TokenLogprob(Frozen):
    """A candidate token and the natural logarithm of its probability."""

    token_id: Count
    logprob: float


class TokenLogprobs(Frozen):
    """The logprob of a drawn token, and the most likely tokens at that step."""

    logprob: float
    """The logprob of the drawn token."""
    top: tuple[TokenLogprob, ...]
    """The `top_logprobs` most likely tokens by falling logprob; on a tie, the lowest id first."""


class Delta(Frozen):
    """The output of one decode step. `text` consists of whole characters and may be empty.

    A delta with the text that was withheld until a time limit has no token.
    """

    request_id: str
    text: str
    token_ids: tuple[Count, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids` if the request asked for logprobs, else empty."""


class Finished(Frozen):
    """The last event of a stream that did not fail."""

    request_id: str
    reason: FinishReason
    matched_stop: str | None
    """The stop string that ended the stream, if any."""
    matched_stop_token_id: int | None = None
    """The id in `stop_token_ids` that ended the stream, if any."""
    usage: Usage
    cache: CacheStatistics
    timings: Timings


class Failed(Frozen):
    """The last event of a stream that failed; it may be the only event. Other streams go on."""

    request_id: str
    error: InstanceOf[BaseException]
    """The exception, with its traceback. Never send its text to a client: it may hold anything."""


Event = Started | Delta | Finished

StepEvent = Event | Failed
"""An event that a step of the engine returns."""
