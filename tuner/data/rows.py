"""Reads the rows of a data file.

Owns the accepted forms of rows, the wording that turns a question into a prompt, and the errors for
other rows. Knows nothing of datasets, tokens or models: the model's chat template renders messages,
and `packing` calls it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from a2sf.errors import InvalidArgument
from a2sf.requests import ChatMessage

ROW_SUFFIXES = (".jsonl", ".json", ".ndjson")
"""Files of rows, one JSON object per line; every other file is running text."""

ANSWER_ROLE = "assistant"
"""The role whose messages count."""


class BadRow(ValueError):
    """A row that cannot be used. The message says what was found, and quotes none of its texts."""


@dataclass(frozen=True)
class Text:
    """A document; everything counts except its beginning."""

    text: str


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer, which counts; the text is both together."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    """All possible answers, including the right one; empty if the answer is free."""
    after: str = "\n"
    """The text after the turn in a sequence that holds more."""


@dataclass(frozen=True)
class Conversation:
    """Messages in turns; those of the role ANSWERS count."""

    messages: tuple[ChatMessage, ...]
    where: str = ""
    """File and line, for errors that only a model's template can find."""

    def __eq__(self, other: object) -> bool:
        """Two conversations are equal if their messages are, whatever their place."""
        return isinstance(other, Conversation) and self.messages == other.messages

    def __hash__(self) -> int:
        return hash(self.messages)


Row = Text | Turn | Conversation


@dataclass(frozen=True)
class Form:
    """One form of rows."""

    pattern: str
    """The form as shown in errors and in the guide."""
    keys: tuple[str, ...]
    """A row with all of these keys is of this form, unless it is of an earlier one."""
    read: Callable[[Mapping[str, Any]], Row]


def _choice(row: Mapping[str, Any]) -> Turn:
    index, choices = row["answer"], row["choices"]
    if not isinstance(choices, list) or not choices:
        raise BadRow(f"choices is {_describe(choices)}, not a list of texts")
    choices = [_as_text(f"choice {n}", choice) for n, choice in enumerate(choices)]
    whole = isinstance(index, int) and not isinstance(index, bool)
    if not whole or not 0 <= index < len(choices):
        found = index if whole else _describe(index)
        raise BadRow(f"answer is {found}, which is no index into {len(choices)} choices")
    lettered = (f"{chr(ord('A') + n)}) {choice}" for n, choice in enumerate(choices))
    answers = tuple(f" {choice}" for choice in choices)
    prompt = f"{_question(row)}Choices: {' '.join(lettered)}\nAnswer:"
    return Turn(prompt, answers[index], answers)


def _solved(row: Mapping[str, Any]) -> Turn:
    return Turn(f"{_question(row)}Answer:", " " + _text_field(row, "answer_text"))


def _answered(row: Mapping[str, Any]) -> Turn:
    return Turn(f"{_question(row)}Answer:", " " + _text_field(row, "answer"))


def _prompted(row: Mapping[str, Any]) -> Turn:
    answers = row["answers"]
    if not isinstance(answers, list) or not answers:
        raise BadRow(f"answers is {_describe(answers)}, not a list of texts")
    _as_text("prompt", row["prompt"])
    return Turn(str(row["prompt"]), " " + _as_text("the first answer", answers[0]))


def _completed(row: Mapping[str, Any]) -> Turn:
    _text_field(row, "prompt")
    _text_field(row, "completion")
    return Turn(row["prompt"], row["completion"])


def _conversation(row: Mapping[str, Any]) -> Conversation:
    value = row["messages"]
    if not isinstance(value, list) or not value:
        raise BadRow(f"messages is {_describe(value)}, not a list of objects with role and content")
    messages = []
    for number, one in enumerate(value, start=1):
        if not isinstance(one, dict):
            raise BadRow(
                f"message {number} is {_describe(one)}, not an object with role and content"
            )
        more = [key for key, value in one.items() if value is not None]
        if odd := sorted(set(more) - {"role", "content"}):
            raise BadRow(f"message {number} has {odd[0]!r}; accepted: role and content")
        for key in ("role", "content"):
            if not isinstance(one.get(key), str):
                raise BadRow(f"{key} of message {number} is {_describe(one.get(key))}, not a text")
        try:
            messages.append(ChatMessage(role=one["role"], content=one["content"]))
        except ValidationError:
            raise BadRow(f"role of message {number} is no name such as user") from None
    if not any(message.role == ANSWER_ROLE and message.content.strip() for message in messages):
        raise BadRow(f"no message of the role {ANSWER_ROLE}, whose messages count")
    if messages[0].role == ANSWER_ROLE:
        raise BadRow(f"the first message is of the role {ANSWER_ROLE}: nothing is asked")
    return Conversation(tuple(messages))


def _text(row: Mapping[str, Any]) -> Text:
    if not isinstance(row["text"], str):
        raise BadRow(f"text is {_describe(row['text'])}, not a text")
    return Text(row["text"])


FORMS = (
    Form("{messages: [{role, content}, ...]}", ("messages",), _conversation),
    Form("{prompt, completion}", ("prompt", "completion"), _completed),
    Form("{prompt, answers}", ("prompt", "answers"), _prompted),
    Form("{question, choices, answer: index}", ("question", "choices", "answer"), _choice),
    Form("{question, answer_text}", ("question", "answer_text"), _solved),
    Form("{question, answer: text}", ("question", "answer"), _answered),
    Form("{text}", ("text",), _text),
)

ROW_FORMS = ", ".join(form.pattern for form in FORMS)


def row_of(value: object) -> Row:
    """Convert one JSON value to a row. Raises BadRow if it is of no accepted form."""
    if not isinstance(value, dict):
        raise BadRow(_describe(value))
    for form in FORMS:
        if all(key in value for key in form.keys):
            try:
                _check_characters(value, form.keys)
                return form.read(value)
            except BadRow as error:
                raise BadRow(f"{form.pattern} where {error}") from None
    keys = ", ".join(repr(str(key)[:40]) for key in list(value)[:6])
    more = ", ..." if len(value) > 6 else ""
    raise BadRow(f"an object with keys {keys}{more}" if value else "an object without keys")


def _check_characters(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        try:
            json.dumps(row[key], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRow(f"{key} has half of a surrogate pair, which is no character") from None


def read_file(path: Path) -> str | list[Row]:
    """Read a file: running text, or rows of one kind, depending on its suffix.

    Raises InvalidArgument, which names file and line, for content that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            "dataset", f"{path}: cannot be read as UTF-8 text: {error}"
        ) from error
    if path.suffix.lower() not in ROW_SUFFIXES:
        return text
    rows: list[Row] = []
    # Not splitlines(): a row's text may contain the rarer line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = row_of(json.loads(line))
        except json.JSONDecodeError as error:
            raise _refuse(where, f"no JSON ({error.msg}, column {error.colno})") from None
        except BadRow as error:
            raise _refuse(where, f"{error}") from None
        if isinstance(row, Conversation):
            row = Conversation(row.messages, where)
        if rows and type(row) is not type(rows[0]):
            raise InvalidArgument(
                "dataset",
                f"{where}: found {KIND_NAMES[type(row)]} among {KIND_NAMES[type(rows[0])]}; "
                "accepted: rows of one kind in a file",
            )
        rows.append(row)
    return rows


KIND_NAMES: dict[type[Row], str] = {
    Text: "documents",
    Turn: "questions or prompts with answers",
    Conversation: "conversations",
}
"""The name for rows of each kind."""


def _refuse(where: str, found: str) -> InvalidArgument:
    return InvalidArgument(
        "dataset", f"{where}: found {found}; accepted: one JSON object a line, as {ROW_FORMS}"
    )


def _question(row: Mapping[str, Any]) -> str:
    return f"Question: {_as_text('question', row['question'])}\n"


def _as_text(name: str, value: object) -> str:
    """Read a text or a number as text, without surrounding white space."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number and not (isinstance(value, str) and value.strip()):
        raise BadRow(f"{name} is {_describe(value)}, not a text with words")
    return str(value).strip()


def _text_field(row: Mapping[str, Any], key: str) -> str:
    """Read a text field, without surrounding white space."""
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{key} is {_describe(value)}, not a text with words")
    return value.strip()


def _describe(value: object) -> str:
    """Describe the type of a JSON value without quoting it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text" if value.strip() else "an empty text"
        case list():
            return "a list" if value else "an empty list"
    return "an object"
