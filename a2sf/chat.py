"""From a conversation to what the model reads, by the template its tokenizer came with.

Owns rendering, its refusals, and what ends an answer's turn. A template is the model's own and runs
in transformers' sandbox. Knows nothing of schedules.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from a2sf.controls import Controls
from a2sf.errors import InvalidArgument, Unsupported
from a2sf.requests import ChatMessage
from a2sf.text import vocabulary

log = logging.getLogger(__name__)

_WORDS = 160
"""Characters of a template's own words that a refusal repeats."""

_SAID = "lorem7ipsum"
"""Stands for what somebody says. No template knows such a word."""


@dataclass(frozen=True)
class Conversation:
    """Messages in one text that ends where the answer begins."""

    text: str
    """Holds the special tokens that the template wants, spelled out."""
    token_ids: tuple[int, ...]


def choose_template(tokenizer: Any, name: str | None) -> None:
    """Make `tokenizer` use the one of its chat templates that has this name; None: its default.

    Raises InvalidArgument where it has none of this name.
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
    """Whether conversations can be put into text: there is a template to use, and it is one."""
    template = _named(tokenizer).get("default")
    return template is not None and _profile(tokenizer, template).sound


def turn_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens by which the template ends an answer; none where it shows none."""
    return _profile(tokenizer, _named(tokenizer).get("default")).turn_ends


def read(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    *,
    max_bytes: int,
    special_in_content: bool = False,
) -> Conversation:
    """Put `messages` into one text and encode it.

    Only the template's own control tokens are read as such. One that a message's content spells out
    is text, unless `special_in_content`; without any, the token ids are those of
    `apply_chat_template(tokenize=True)`.

    Raises Unsupported where there is no template to use, and InvalidArgument for messages that the
    template refuses, such as roles that it does not know or that do not take turns, for a text of
    more than `max_bytes` of UTF-8, and for a control token in a content that cannot be told from
    the template's.
    """
    if not has_template(tokenizer):
        raise Unsupported(_lacking(tokenizer))
    text = _render(tokenizer, messages)
    if (size := len(text.encode())) > max_bytes:
        raise InvalidArgument("chat", f"{size} bytes; accepted: at most {max_bytes}")
    controls = _profile(tokenizer, _named(tokenizer)["default"]).controls
    if special_in_content:
        return Conversation(text, controls.recognised(text))
    marks = controls.marks([message.content for message in messages])
    if not marks:
        return Conversation(text, controls.encode(text, {}))
    marked = [
        message.model_copy(update={"content": controls.mark(message.content, marks)})
        for message in messages
    ]
    rendered = _render(tokenizer, marked)
    if controls.unmark(rendered, marks) != text:
        # The template looks for it in what is said, or changes it.
        raise InvalidArgument("chat", f"a message spells {controls.spelled(marks)}{_UNTOLD}")
    return Conversation(text, controls.encode(rendered, marks))


_UNTOLD = (
    ", which the model's chat template does not leave as it is, so that it cannot be told from the "
    "template's own control tokens; leave it out, or set special_tokens_in_content"
)


@dataclass(frozen=True)
class _Profile:
    """What a template shows of itself."""

    sound: bool
    """Whether it can be compiled."""
    turn_ends: tuple[int, ...]
    controls: Controls


@lru_cache(maxsize=8)
def _profile(tokenizer: Any, template: str | None) -> _Profile:
    """Look at what `template`, the one that `tokenizer` uses, makes of a conversation."""
    sound, ends, own = True, None, ""
    if template is not None:
        ends = next(_ends(tokenizer), None)
        try:
            own = _apply(tokenizer, [("user", _SAID)], to_answer=True).replace(_SAID, "")
        except TemplateSyntaxError:
            sound = False
        except Exception:
            # It wants another conversation, and shows its control tokens in the real ones.
            log.debug("the chat template does not begin with a user's message")
    turn_ends = () if ends is None else (ends,)
    added = vocabulary(tokenizer).added
    shown = {index for index, one in added.items() if one.content.strip() and one.content in own}
    return _Profile(sound, turn_ends, Controls(tokenizer, shown | set(turn_ends)))


def _ends(tokenizer: Any) -> Iterator[int]:
    """Yield the token that follows what the assistant has said, in one conversation or another.

    The last thing said comes first: some models end parts of an answer in another way.
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
    # A template is a program: what it makes of a conversation may be any error of Python's.
    except Exception as error:
        # Not in the log, for a template's words may hold the messages.
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
    """The tokenizer's templates by name; one without a name is the default."""
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
