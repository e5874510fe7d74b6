"""What a row says, and how one that says nothing of use is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from a2sf.errors import InvalidArgument
from tests.tuner.conftest import sums, write_rows
from tuner.data.rows import FORMS, Conversation, Row, Text, Turn, read_file, row_of

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "tuner.md"

SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_choice_row_lists_lettered_choices_and_answers_with_the_text() -> None:
    turn = row_of({"question": "Two and two?", "choices": ["3", "4"], "answer": 1})
    assert turn == Turn("Question: Two and two?\nChoices: A) 3 B) 4\nAnswer:", " 4", (" 3", " 4"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer_text": "so 4\n#### 4", "final": "4"}, " so 4\n#### 4"),
        ({"question": "q", "answer": "four"}, " four"),
        ({"prompt": "Say it:", "answers": ["it", "that"]}, " it"),
        ({"prompt": "2 + 2 =", "answers": [4]}, " 4"),
        ({"prompt": "2 + 2 =", "completion": " 4", "id": 7}, " 4"),
        ({"prompt": "Say it: ", "completion": "it"}, "it"),
    ],
)
def test_other_kinds_of_rows_keep_the_words_of_their_answers(
    row: dict[str, Any], said: str
) -> None:
    turn = row_of(row)
    assert isinstance(turn, Turn)
    assert turn.answer == said
    assert turn.question in (row.get("prompt"), "Question: q\nAnswer:")


def test_a_document_is_its_text_and_a_conversation_its_messages() -> None:
    assert row_of({"text": "Once upon a time", "source": "web"}) == Text("Once upon a time")
    conversation = row_of({"messages": SAID, "prompt": "Hi", "prompt_id": 3})
    assert isinstance(conversation, Conversation)
    assert [message.model_dump() for message in conversation.messages] == SAID


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ('{"question": "q"}', "an object with keys 'question'"),
        ('{"txt": "secret words", "id": 1}', "an object with keys 'txt', 'id'"),
        ("{}", "an object without keys"),
        ("[1]", "a list"),
        ('"secret words"', "a text"),
        ("{", "no JSON (Expecting property name enclosed in double quotes, column 2)"),
        (
            '{"question": "q", "choices": ["a"], "answer": 1}',
            "{question, choices, answer: index} where answer is 1, which is no index into 1",
        ),
        ('{"prompt": "p", "completion": 4}', "{prompt, completion} where completion is a number"),
        ('{"prompt": "p", "completion": " "}', "where completion is an empty text"),
        ('{"prompt": [], "completion": "c"}', "where prompt is an empty list"),
        (
            '{"question": "q", "choices": ["secret words", "b"], "answer": true}',
            "where answer is true or false, which is no index into 2",
        ),
        (
            '{"question": "q", "choices": ["secret words", null], "answer": 0}',
            "where choice 1 is null, not a text with words",
        ),
        ('{"question": null, "answer": "secret words"}', "where question is null"),
        ('{"prompt": null, "answers": ["secret words"]}', "where prompt is null"),
        ('{"prompt": "secret words", "answers": [" "]}', "where the first answer is an empty text"),
        ('{"text": "secret words \\ud83d"}', "where text has half of a surrogate pair"),
        (
            '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            "where messages has half of a surrogate pair",
        ),
        ('{"text": ["secret words"]}', "{text} where text is a list"),
        ('{"messages": "Hi"}', "where messages is a text, not a list of objects"),
        ('{"messages": [["user", "Hi"]]}', "where message 1 is a list"),
        ('{"messages": [{"from": "human"}]}', "where message 1 has 'from'; accepted: role and"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "where content of message 1 is a list",
        ),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "no message of the role assistant"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "nothing is asked"),
    ],
)
def test_a_row_of_an_unknown_form_is_reported_with_file_line_and_contents(
    tmp_path: Path, row: str, found: str
) -> None:
    path = write_rows(tmp_path / "bad.jsonl", sums(0, 2))
    path.write_text(path.read_text(encoding="utf-8") + row + "\n", encoding="utf-8")
    with pytest.raises(InvalidArgument) as caught:
        read_file(path)
    message = str(caught.value)
    assert message.startswith(f"dataset: {path}, line 3: found ")
    assert found in message
    assert all(form.pattern in message for form in FORMS)
    assert "secret words" not in message


def test_rows_of_two_kinds_in_a_file_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mixed.jsonl", [*sums(0, 1), {"text": "And so on."}])
    with pytest.raises(InvalidArgument, match=r"line 2: found documents among questions"):
        read_file(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson", ".JSONL"])
def test_rows_are_read_after_a_byte_order_mark_and_between_blank_lines(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"mine{suffix}"
    path.write_text('\ufeff{"text": "a\\u2028b"}\n\n{"text": ""}\n', encoding="utf-8")
    assert read_file(path) == [Text("a\u2028b"), Text("")]


def test_every_example_of_the_guide_is_a_row_of_the_form_beside_it() -> None:
    rows = re.findall(r"^\| `(\{.*?\})` \| `(\{.*?\})` \|", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert [shown for shown, _ in rows] == [form.pattern for form in FORMS]
    for form, (_, example) in zip(FORMS, rows, strict=True):
        read: Row = row_of(json.loads(example))
        assert read == form.read(json.loads(example))
