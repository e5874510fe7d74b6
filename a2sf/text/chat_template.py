"""Renders a conversation to a prompt, with the chat template of the model's tokenizer.

Owns rendering, its errors, and the tokens that end an assistant turn. The template comes with the
model and runs in transformers' sandbox. Knows nothing of schedules.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from a2sf.errors import InvalidArgument, Unsupported
from a2sf.requests import ChatMessage
from a2sf.text.control_tokens import Controls
from a2sf.text.detokenizer import vocabulary

log = logging.getLogger(__name__)

_WORDS = 160
"""Longest excerpt of a template's error message that we quote, in characters."""

_SAID = "lorem7ipsum"
"""Placeholder for a message's content. No template contains this word."""


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation. The text ends where the answer begins."""

    text: str
    """Includes the template's special tokens, spelled out."""
    token_ids: tuple[int, ...]


def choose_template(tokenizer: Any, name: str | None) -> None:
    """Make `tokenizer` use its chat template of this name; None: its default.

    Raises InvalidArgument if it has no template of this name.
    """
    if name is None:
        return
    named = _named(tokenizer)
    if name not in named:
        accepted = (
            ", ".join(sorted(named)) if named else "none, for this model has no chat template"
        )
        raise InvalidArgument("--chat-template", f"{name!r}; accepted: {accepted}")
    tokenizer.chat_template = named[name]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a usable default chat template."""
    template = _named(tokenizer).get("default")
    return template is not None and _profile(tokenizer, template).sound


def turn_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens with which the template ends an answer; empty if none can be found."""
    return _profile(tokenizer, _named(tokenizer).get("default")).turn_ends


def read(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    *,
    max_bytes: int,
    special_in_content: bool = False,
) -> Conversation:
    """Render `messages` to one text and encode it.

    Control tokens of the template are encoded as control tokens. A control token that a message's
    content spells out is encoded as text, unless `special_in_content` is set. If no content spells
    one out, the token ids equal those of `apply_chat_template(tokenize=True)`.

    Raises:
        Unsupported: there is no usable template.
        InvalidArgument: the template refuses the messages, for instance because of an unknown role
            or the order of roles; the text has more than `max_bytes` of UTF-8; or a control token
            in a content cannot be distinguished from the template's own.
    """
    if not has_template(tokenizer):
        raise Unsupported(_lacking(tokenizer))
    text = _render(tokenizer, messages)
    if (size := len(text.encode())) > max_bytes:
        raise InvalidArgument("chat", f"{size} bytes; accepted: at most {max_bytes}")
    controls = _profile(tokenizer, _named(tokenizer)["default"]).controls
    if special_in_content:
        return Conversation(text, controls.encode_all(text))
    placeholders = controls.placeholders([message.content for message in messages])
    if not placeholders:
        return Conversation(text, controls.encode(text, {}))
    marked = [
        message.model_copy(update={"content": controls.replace(message.content, placeholders)})
        for message in messages
    ]
    rendered = _render(tokenizer, marked)
    if controls.restore(rendered, placeholders) != text:
        # The template searches the content for this token, or changes the content.
        raise InvalidArgument(
            "chat", f"a message spells {controls.describe(placeholders)}{_INDISTINGUISHABLE}"
        )
    return Conversation(text, controls.encode(rendered, placeholders))


_INDISTINGUISHABLE = (
    ", which the model's chat template changes, so it cannot be distinguished from the template's "
    "own control tokens; leave it out, or set special_tokens_in_content"
)


@dataclass(frozen=True)
class _Profile:
    """What we learn about a template by rendering test conversations."""

    sound: bool
    """Whether the template compiles."""
    turn_ends: tuple[int, ...]
    controls: Controls


@lru_cache(maxsize=8)
def _profile(tokenizer: Any, template: str | None) -> _Profile:
    """Render test conversations with `template`, which must be the one that `tokenizer` uses."""
    sound, ends, own = True, None, ""
    if template is not None:
        ends = next(_ends(tokenizer), None)
        try:
            own = _apply(tokenizer, [("user", _SAID)], to_answer=True).replace(_SAID, "")
        except TemplateSyntaxError:
            sound = False
        except Exception:
            # The template needs another conversation; real ones will show its control tokens.
            log.debug("the chat template does not begin with a user's message")
    turn_ends = () if ends is None else (ends,)
    added = vocabulary(tokenizer).added
    shown = {index for index, one in added.items() if one.content.strip() and one.content in own}
    return _Profile(sound, turn_ends, Controls(tokenizer, shown | set(turn_ends)))


def _ends(tokenizer: Any) -> Iterator[int]:
    """Yield the token that follows an assistant message, for several test conversations.

    The first conversation ends with that message, because some models end earlier answers with
    another token.
    """
    added = vocabulary(tokenizer).added
    before = [("user", "a")]
    for start in ([], [("system", "a")]):
        for after in ([], [("user", "b")]):
            said = [*start, *before, ("assistant", _SAID), *after]
            try:
                text = _apply(tokenizer, said, to_answer=False)
            except Exception:
                log.debug("the chat template does not take roles %s", [role for role, _ in said])
                continue
            if _SAID not in text:
                continue
            rest = text.rpartition(_SAID)[2].lstrip()
            names = {one.content: index for index, one in added.items() if one.content.strip()}
            found = [name for name in names if rest.startswith(name)]
            if found:
                yield names[max(found, key=len)]


def _render(tokenizer: Any, messages: Sequence[ChatMessage]) -> str:
    pairs = [(message.role, message.content) for message in messages]
    try:
        return _apply(tokenizer, pairs, to_answer=True)
    # A template is a program, so it may raise any Python exception.
    except Exception as error:
        # The error's text may quote the messages, so it is not logged.
        log.debug("the chat template refused a conversation: %s", type(error).__name__)
        words = type(error).__name__
        if isinstance(error, TemplateError):
            words = " ".join(str(error).split()) or words
        if len(words) > _WORDS:
            words = words[:_WORDS] + "..."
        roles = ", ".join(message.role for message in messages[:8])
        more = ", ..." if len(messages) > 8 else ""
    raise InvalidArgument(
        "chat",
        f"the model's chat template does not accept these messages ({words}); their roles are "
        f"{roles}{more}, and most templates want system first, then user and assistant in turns",
    )


def _apply(tokenizer: Any, messages: Sequence[tuple[str, str]], *, to_answer: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=to_answer,
    )
    return text


def _named(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's templates by name; a template without a name is the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        return templates
    return {"default": templates} if templates else {}


def _lacking(tokenizer: Any) -> str:
    named = _named(tokenizer)
    if not named:
        return "this model has no chat template; give the prompt as text"
    if "default" in named:
        return "this model's chat template cannot be read; give the prompt as text"
    return (
        f"this model has chat templates {', '.join(sorted(named))} and no default; the server "
        "needs --chat-template NAME, or give the prompt as text"
    )
