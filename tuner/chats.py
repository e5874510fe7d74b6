"""From a conversation to prompts and answers, as the model's chat template puts them.

Owns which of its messages count and how much of it fits. What is read before an answer is what the
service would read: its renderer makes it. Knows nothing of datasets.
"""

import sys
from collections.abc import Sequence

from jinja2 import TemplateError

from a2sf import chat
from a2sf.errors import InvalidArgument, Unsupported
from a2sf.models import LoadedModel
from a2sf.requests import ChatMessage
from tuner.rows import ANSWERS, Conversation, Turn


def turns_of(model: LoadedModel, conversation: Conversation, room: int) -> tuple[Turn, ...]:
    """Put the longest beginning of a conversation that fits into turns of text.

    Each answer is a turn; its question is all that the template puts before it. Where the template
    words later what it has worded before, as some do with thoughts, what came before is prompt and
    no longer counts.

    Args:
        model: whose chat template and tokens it is.
        conversation: what is said.
        room: the most tokens.

    Returns:
        The turns; none where not even the first answer fits.

    Raises InvalidArgument, with file and line, for messages that the template refuses, and for a
    control token that a message spells; Unsupported where the model has no template.
    """
    turns: tuple[Turn, ...] = ()
    text = ""
    for place, message in enumerate(conversation.messages):
        said = message.content.strip()
        if message.role != ANSWERS or not said:
            continue
        prompt = _prompt(model, conversation, place)
        if not prompt.startswith(text):
            turns, text = (), ""
        lead, after = _around(model, conversation.messages[: place + 1], prompt, said)
        whole = prompt + lead + said
        if len(model.encode(whole + after, special=False)) > room:
            break
        turns = (*turns, Turn(prompt[len(text) :] + lead, said, after=after))
        text = whole
    return turns


def _prompt(model: LoadedModel, conversation: Conversation, place: int) -> str:
    """What is read before the message at a place."""
    before = conversation.messages[:place]
    try:
        read = chat.read(model.tokenizer, before, max_bytes=sys.maxsize)
    except Unsupported as error:
        raise Unsupported(
            f"{conversation.where}: found messages, and {error} as rows of prompt and completion"
        ) from None
    except InvalidArgument as error:
        raise InvalidArgument("dataset", f"{conversation.where}: {error.problem}") from None
    if model.encode(read.text, special=False) != read.token_ids:
        raise InvalidArgument(
            "dataset",
            f"{conversation.where}: a message spells a control token of the model; leave the row "
            "out",
        )
    return read.text


def _around(
    model: LoadedModel, messages: Sequence[ChatMessage], prompt: str, said: str
) -> tuple[str, str]:
    """What the template puts between the prompt and the last message, and after it."""
    try:
        whole: str = model.tokenizer.apply_chat_template(
            [message.model_dump() for message in messages],
            tokenize=False,
            add_generation_prompt=False,
        )
    except TemplateError:
        return "", "\n"
    lead, found, after = whole.removeprefix(prompt).partition(said)
    return (lead, after) if whole.startswith(prompt) and found else ("", "\n")
