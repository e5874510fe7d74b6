"""Conversations as the model's template puts them: what is prompt, what counts, what is refused."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from a2sf.errors import InvalidArgument, Unsupported
from a2sf.model.loader import LoadedModel, load_model
from tests.tiny import save_tiny_llama
from tests.tuner.conftest import write_rows
from tuner.data import packing
from tuner.data.chats import turns_of
from tuner.data.datasets import load
from tuner.data.rows import Conversation, row_of

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Leaves out of later prompts what earlier answers have thought aloud.
FORGETFUL = TURNS.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = save_tiny_llama(tmp_path_factory.mktemp("chatting"))
    return load_model(str(directory), device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def template(model: LoadedModel) -> None:
    model.tokenizer.chat_template = TURNS


def said(*contents: str, first: str = "user") -> dict[str, Any]:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return {
        "messages": [
            {"role": roles[number % len(roles)], "content": content}
            for number, content in enumerate(contents)
        ]
    }


def conversation(*contents: str, **options: str) -> Conversation:
    row = row_of(said(*contents, **options))
    assert isinstance(row, Conversation)
    return Conversation(row.messages, "mine.jsonl, line 3")


def test_each_answer_counts_and_its_prompt_is_the_service_s(
    model: LoadedModel,
) -> None:
    turns = turns_of(model, conversation("Hi", " Hello. ", "And?", "Bye."), 500)
    assert [(turn.question, turn.answer) for turn in turns] == [
        ("<bos>[user] Hi<eos>\n[assistant] ", "Hello."),
        ("<eos>\n[user] And?<eos>\n[assistant] ", "Bye."),
    ]
    assert turns[-1].after == "<eos>\n"


def test_a_conversation_is_cut_after_the_last_answer_that_fits(model: LoadedModel) -> None:
    whole = conversation("Hi", "Hello.", "And?", "x" * 300)
    assert [turn.answer for turn in turns_of(model, whole, 200)] == ["Hello."]
    assert turns_of(model, whole, 10) == ()


def test_if_the_template_drops_an_answer_only_later_answers_count(
    model: LoadedModel,
) -> None:
    model.tokenizer.chat_template = FORGETFUL
    (turn,) = turns_of(model, conversation("Hi", "hm</think>Hello.", "And?", "Bye."), 500)
    assert turn.answer == "Bye."
    assert turn.question == (
        "<bos>[user] Hi<eos>\n[assistant] Hello.<eos>\n[user] And?<eos>\n[assistant] "
    )


@pytest.mark.parametrize(
    ("template", "contents", "message"),
    [
        (STRICT, ("Be kind", "Hi", "Hello"), "does not accept these messages (no system)"),
        (TURNS, ("Hi<eos>", "Hello"), "a message spells a control token"),
        (TURNS, ("Hi", "Hello<eos>Bye"), "a message spells a control token"),
    ],
)
def test_messages_that_the_template_refuses_are_reported_with_file_and_line(
    model: LoadedModel, template: str, contents: tuple[str, ...], message: str
) -> None:
    model.tokenizer.chat_template = template
    first = "system" if len(contents) == 3 else "user"
    with pytest.raises(InvalidArgument) as caught:
        turns_of(model, conversation(*contents, first=first), 500)
    assert str(caught.value).startswith("dataset: mine.jsonl, line 3: ")
    assert message in str(caught.value)


def test_a_model_without_a_template_is_refused_with_an_alternative(model: LoadedModel) -> None:
    model.tokenizer.chat_template = None
    with pytest.raises(Unsupported, match=r"line 3: found messages, and this model has no chat"):
        turns_of(model, conversation("Hi", "Hello"), 500)


def test_short_conversations_share_a_sequence_and_only_answers_are_predicted(
    model: LoadedModel, tmp_path: Path
) -> None:
    rows = [said(f"What is {n}?", f"It is {n}.", "Sure?", "Yes.") for n in range(40)]
    dataset = load(str(write_rows(tmp_path / "mine.jsonl", rows)), None)
    made = packing.items(model, dataset.calibration, count=4, length=256, seed=0)
    assert len(made) == 4
    for item in made:
        example = item.example
        assert 150 < len(example.token_ids) <= 256
        text = model.tokenizer.decode(list(example.token_ids))
        assert text.startswith("<bos>[user] What is ")
        # Every conversation begins as it would be served, and nothing else adds special tokens.
        assert text.count("<bos>") == text.count("[user] What is ") > 1
        predicted = "".join(
            model.tokenizer.decode([example.token_ids[position + 1]])
            for position in example.counted
        )
        assert predicted.replace("Yes.", "").startswith("It is ")
        assert set("?[]<>") & set(predicted) == set()
        prompt = model.tokenizer.decode(list(example.token_ids[: example.prompt_tokens]))
        assert prompt.endswith("<eos>\n[assistant] ")
        assert item.answers == ()


def test_with_one_question_each_conversation_is_a_sequence(
    model: LoadedModel, tmp_path: Path
) -> None:
    rows = [said(f"What is {n}?", f"It is {n}.") for n in range(10)]
    dataset = load(str(write_rows(tmp_path / "mine.jsonl", rows)), None)
    made = packing.items(model, dataset.calibration, count=8, length=256, seed=0, shots=0)
    texts = [model.tokenizer.decode(list(item.example.token_ids)) for item in made]
    order = list(range(8))
    Random(f"0/{dataset.calibration.split}").shuffle(order)
    assert texts == [f"<bos>[user] What is {n}?<eos>\n[assistant] It is {n}.<eos>\n" for n in order]
    with pytest.raises(InvalidArgument, match="accepted for conversations: 0"):
        packing.items(model, dataset.calibration, count=8, length=256, seed=0, shots=1)
