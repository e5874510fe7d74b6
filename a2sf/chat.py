"""From a conversation to the text that the model reads, by the template its tokenizer came with.

Owns rendering and its two refusals. A template is the model's own and runs in transformers'
sandbox. Knows nothing of token ids or of schedules.
"""

import logging
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from a2sf.errors import InvalidArgument, Unsupported
from a2sf.requests import ChatMessage

log = logging.getLogger(__name__)


def has_template(tokenizer: Any) -> bool:
    """Whether `tokenizer` came with a chat template."""
    return bool(tokenizer.chat_template)


def render(tokenizer: Any, messages: Sequence[ChatMessage]) -> str:
    """Put `messages` into one text that ends where the answer begins.

    The text holds the special tokens that the template wants, spelled out: encode it without adding
    any. Raises Unsupported where there is no template, and InvalidArgument for messages that the
    template refuses, such as roles that it does not know or that do not take turns.
    """
    if not has_template(tokenizer):
        raise Unsupported("this model has no chat template; give the prompt as text")
    try:
        text: str = tokenizer.apply_chat_template(
            [message.model_dump() for message in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
    except TemplateError as error:
        # No more than the kind: the template's own words may hold the messages.
        log.debug("the chat template refused a conversation: %s", type(error).__name__)
        roles = ", ".join(message.role for message in messages[:8])
        more = ", ..." if len(messages) > 8 else ""
        raise InvalidArgument(
            "chat",
            f"the model's chat template does not accept these messages; their roles are {roles}"
            f"{more}, and most templates want system first, then user and assistant in turns",
        ) from None
    return text
