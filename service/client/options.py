"""The inputs of a completion: a conversation, and the options of a request.

The counterpart of `service.client.results`. Knows nothing of messages.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from a2sf.policy import CachePolicy
from a2sf.requests import ChatMessage, Sampling

Chat: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation: `ChatMessage` values, or mappings with the same fields."""


class GenerationOptions(TypedDict, total=False):
    """Options of a completion besides prompt and length; all are optional."""

    min_new_tokens: int
    """Until this many tokens, nothing but the time limit ends the completion."""
    time_limit_s: float
    """Seconds after which the completion ends with the tokens so far; unlike a deadline, it loses
    nothing."""
    sampling: Sampling | Mapping[str, Any]
    """How tokens are sampled: a `Sampling`, or a mapping with the same fields."""
    stop: Sequence[str]
    """Strings that end the completion; its text does not include them."""
    stop_token_ids: Sequence[int]
    """Token ids that end the completion; its text does not include them."""
    ignore_eos: bool
    """Continue past the model's end-of-sequence tokens, and past the end of the assistant's turn in
    a chat."""
    special_tokens_in_content: bool
    """Encode control tokens that chat messages spell out as control tokens, not as text."""
    cache_policy: CachePolicy | Mapping[str, Any]
    """What the cache may evict: a `CachePolicy`, or a mapping with the same fields; by default the
    server's policy."""
    request_id: str
    """Id of the request in the server's logs; by default the server makes a random one."""
    token_ids: bool
    """Whether the response has token ids besides the text."""
    logprobs: bool
    """Whether the response has the log-probability of each token."""
    top_logprobs: int
    """How many of the most likely tokens to return per step; needs `logprobs`."""
    echo: bool
    """Whether the first event has the prompt as the model reads it."""
