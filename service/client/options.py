"""What a client is told: a conversation, and what a completion may be told besides its prompt.

The mirror of `service.client.results`, which is what it gets. Knows nothing of messages.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

from a2sf.policy import CachePolicy
from a2sf.requests import ChatMessage, Sampling

Chat: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation: `ChatMessage` values, or mappings with their fields."""


class GenerationOptions(TypedDict, total=False):
    """What a completion may be told besides its prompt and length; all may be left out."""

    min_new_tokens: int
    """Tokens before which nothing but the time limit ends the completion."""
    time_limit_s: float
    """Seconds after which the completion ends with what it has; unlike a deadline, nothing is
    lost."""
    sampling: Sampling
    """How tokens are drawn."""
    stop: Sequence[str]
    """Strings that end the completion and are left out of it."""
    stop_token_ids: Sequence[int]
    """Token ids that end the completion and are left out of its text."""
    ignore_eos: bool
    """Write on past the model's end-of-sequence tokens, and past the end of the answer to a
    chat."""
    special_tokens_in_content: bool
    """Read control tokens that chat messages spell out as such, not as text."""
    cache_policy: CachePolicy
    """What the cache may forget; by default what the server was set to."""
    request_id: str
    """Names the request in the server's logs; by default the server makes one up."""
    token_ids: bool
    """Whether the answer carries token ids beside the text."""
    logprobs: bool
    """Whether it carries how likely each token was."""
    top_logprobs: int
    """So many most likely tokens at each step too; needs `logprobs`."""
    echo: bool
    """Whether the first event carries the prompt as it was read."""
