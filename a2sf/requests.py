"""What goes into the engine and what comes out: the values that cross its front door.

Owns the request, the stream's events and the figures in them, all frozen. Knows nothing of
tensors or of transport; the service converts these to and from messages.
"""

import enum
from typing import Annotated

from pydantic import Field, InstanceOf, ValidationInfo, field_validator

from a2sf.policy import CachePolicy, EffectivePolicy
from a2sf.schema import AlphaTable, Count, Frozen, Given, Positive

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TOP_LOGPROBS = 20


class Sampling(Given):
    """How the next token is drawn. Filters apply in the order of the fields here."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0, allow_inf_nan=False)] = 1.0
    """Divides the positive logits of tokens in the prompt or completion, multiplies the negative
    ones; 1 does nothing, more discourages repeating. The greedy choice heeds it too."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    """0 is greedy: the most likely token, the lowest id on a tie."""
    top_k: Count = 0
    """Draw from the k most likely tokens, and those as likely as the k-th; 0 means all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum, the lowest ids of equals."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = 0.0
    """Leave out tokens less likely than this share of the most likely one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """None lets the engine choose one; the stream's first event tells which."""


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatMessage(Given):
    """One message of a conversation."""

    role: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")]
    """Who says it, as the model's template names them: `system`, `user`, `assistant`, ..."""
    content: str


class GenerationRequest(Frozen):
    """One completion to make. `table` is the alpha table that the policy names, looked up."""

    request_id: str
    prompt_ids: Annotated[tuple[Count, ...], Field(min_length=1)]
    max_new_tokens: Positive
    min_new_tokens: Count = 0
    """Tokens before which nothing but the time limit ends the completion; at most max_new_tokens.
    A token that would end it is not drawn among them, and a stop string counts only where a later
    token completes it."""
    priority: int = 0
    """Of the requests that wait, the highest goes first, and among equals the oldest. A lower one
    waits as long as higher ones come; none that runs is interrupted."""
    time_limit_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Seconds from submission after which the stream ends with what it has: in the step that finds
    them over, before anything is drawn in it. A request that has no token by then, or still waits,
    ends too, with `Started` and `Finished` like any other."""
    sampling: Sampling = Sampling()
    stop: Annotated[tuple[StopString, ...], Field(max_length=MAX_STOP_STRINGS)] = ()
    """Strings that end the completion and are left out of its text. One that is the name of a
    special token ends it by that token too, which is never part of the text."""
    stop_token_ids: Annotated[tuple[Count, ...], Field(max_length=MAX_STOP_TOKEN_IDS)] = ()
    """Tokens that end the completion and are left out of its text."""
    turn_end_ids: tuple[Count, ...] = ()
    """Tokens that end the answer's turn in a conversation, and so the completion, beside the
    model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Write on past those and the model's end-of-sequence tokens."""
    logprobs: bool = False
    """Tell each token's logprob: the log-softmax of the raw logits, before any setting above."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    """Most likely tokens to tell at each step, with their logprobs; needs `logprobs`."""
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
    """Why a stream ended in the ordinary way. A failure is `Failed`, never a reason."""

    LENGTH = "length"
    STOP = "stop"
    END_OF_SEQUENCE = "end_of_sequence"
    TIME_LIMIT = "time_limit"


class Usage(Frozen):
    """Tokens read and written."""

    prompt_tokens: Count
    completion_tokens: Count


class CacheStatistics(Frozen):
    """What the row held when it ended, and in how many bytes of the cache's tensors."""

    budget: Positive
    """Slots of the row for each head, the mean over layers and heads."""
    kept_tokens: Count
    """Tokens that each head stored at the end, the mean over layers and heads, rounded."""
    evicted_tokens: Count
    """Tokens that it dropped on the way: all but those that are kept."""
    kv_bytes: Count
    """Bytes of the slots that hold them: keys, values, positions and scores of every layer."""
    kv_bytes_full: Count
    """Bytes of keys and values that a cache without eviction would hold now."""


class Timings(Frozen):
    """Seconds on the engine's clock; 0 for a part that the request did not live to see."""

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


class TokenLogprob(Frozen):
    """A token that might have been chosen, and the natural logarithm of its probability."""

    token_id: Count
    logprob: float


class TokenLogprobs(Frozen):
    """How likely the model found a chosen token, and what it found most likely."""

    logprob: float
    """Of the chosen token."""
    top: tuple[TokenLogprob, ...]
    """The `top_logprobs` most likely tokens by falling logprob, the lowest id first on a tie."""


class Delta(Frozen):
    """What one decode step added. `text` ends at a character's boundary and may be empty.

    The text withheld at a time limit comes without a token.
    """

    request_id: str
    text: str
    token_ids: tuple[Count, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids` where the request asked; else none."""


class Finished(Frozen):
    """The last event of a stream that did not fail."""

    request_id: str
    reason: FinishReason
    matched_stop: str | None
    """The stop string that ended the stream, where one did."""
    matched_stop_token_id: int | None = None
    """The one of `stop_token_ids` that ended the stream, where one did."""
    usage: Usage
    cache: CacheStatistics
    timings: Timings


class Failed(Frozen):
    """The last event of a stream that failed, and no other stream did. It may be the only one."""

    request_id: str
    error: InstanceOf[BaseException]
    """What was raised, with its traceback. Its text may hold anything, so show it to no client."""


Event = Started | Delta | Finished

StepEvent = Event | Failed
"""What a step of the engine has to tell."""
