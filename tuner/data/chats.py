"""Turns conversations into prompts and answers with the model's chat template.

Owns which messages count and how much of a conversation fits. Prompts are rendered by the service's
own renderer, so they equal the service's prompts. Knows nothing of datasets.
"""

import sys
from collections.abc import Sequence

from jinja2 import TemplateError

from a2sf.errors import InvalidArgument, Unsupported
from a2sf.model.loader import LoadedModel
from a2sf.requests import ChatMessage
from a2sf.text import chat_template
from tuner.data.rows import ANSWER_ROLE, Conversation, Turn


def turns_of(model: LoadedModel, conversation: Conversation, room: int) -> tuple[Turn, ...]:
    """Render the longest beginning of a conversation that fits, as turns of text.

    Each answer is a turn. Its question is all text that the template puts before it. Some templates
    render earlier messages differently later, for instance thoughts. If that happens, the text
    before is prompt and its answers no longer count.

    Args:
        model: provides the chat template and the tokenizer.
        conversation: the messages.
        room: the largest number of tokens.

    Returns:
        The turns; empty if not even the first answer fits.

    Raises InvalidArgument, with file and line, if the template refuses the messages or a message
    spells a control token; Unsupported if the model has no template.
    """
    turns: tuple[Turn, ...] = ()
    text = ""
    for place, message in enumerate(conversation.messages):
        answer = message.content.strip()
        if message.role != ANSWER_ROLE or not answer:
            continue
        prompt = _prompt(model, conversation, place)
        if not prompt.startswith(text):
            turns, text = (), ""
        lead, after = _around(model, conversation.messages[: place + 1], prompt, answer)
        text_so_far = prompt + lead + answer
        if len(model.encode(text_so_far + after, special=False)) > room:
            break
        # `_prompt` has checked the messages before.
        special = set(model.tokenizer.all_special_ids) - {model.tokenizer.unk_token_id}
        if not special.isdisjoint(model.encode(answer, special=False)):
            raise _control_token_error(conversation)
        turns = (*turns, Turn(prompt[len(text) :] + lead, answer, after=after))
        text = text_so_far
    return turns


def _prompt(model: LoadedModel, conversation: Conversation, place: int) -> str:
    """Render the prompt for the message at index `place`."""
    before = conversation.messages[:place]
    try:
        read = chat_template.read(model.tokenizer, before, max_bytes=sys.maxsize)
    except Unsupported as error:
        raise Unsupported(
            f"{conversation.where}: found messages, and {error} as rows of prompt and completion"
        ) from None
    except InvalidArgument as error:
        raise InvalidArgument("dataset", f"{conversation.where}: {error.problem}") from None
    if model.encode(read.text, special=False) != read.token_ids:
        raise _control_token_error(conversation)
    return read.text


def _control_token_error(conversation: Conversation) -> InvalidArgument:
    return InvalidArgument(
        "dataset",
        f"{conversation.where}: a message spells a control token of the model; leave the row out",
    )


def _around(
    model: LoadedModel, messages: Sequence[ChatMessage], prompt: str, answer: str
) -> tuple[str, str]:
    """Return the template's text between the prompt and the last message, and after it."""
    try:
        whole: str = model.tokenizer.apply_chat_template(
            [message.model_dump() for message in messages],
            tokenize=False,
            add_generation_prompt=False,
        )
    except TemplateError:
        return "", "\n"
    lead, found, after = whole.removeprefix(prompt).partition(answer)
    return (lead, after) if whole.startswith(prompt) and found else ("", "\n")
