"""Which tokens are prompt, which positions count, and how much goes into one sequence."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from tuner.data import packing
from tuner.data.datasets import load
from tuner.data.parts import Group, Part
from tuner.data.rows import Turn


def part_of(*turns: Turn) -> Part:
    def groups(_: Random) -> Iterator[Group]:
        return ((turn,) for turn in turns)

    return Part("calibration", groups=groups)


QUESTIONS = [Turn(f"Question: {n}?\nAnswer:", f" {n}{n}") for n in range(30)]


def text_of(model: LoadedModel, ids: tuple[int, ...]) -> str:
    text: str = model.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


def test_the_counted_positions_predict_the_answers_and_nothing_else(
    tiny_model: LoadedModel,
) -> None:
    # One token a byte, so the space before an answer is a token of its own, which does not count.
    made = packing.examples(tiny_model, part_of(*QUESTIONS), count=9, length=100, seed=0)
    assert len(made) >= 3
    for example in made:
        text = text_of(tiny_model, example.token_ids)
        predicted = text_of(tiny_model, tuple(example.token_ids[t + 1] for t in example.counted))
        answers = [line.removeprefix("Answer: ") for line in text.split("\n")[1::2]]
        assert len(answers) >= 3
        assert predicted == "".join(answers)


def test_the_prompt_ends_where_the_first_answer_begins(tiny_model: LoadedModel) -> None:
    (example,) = packing.examples(tiny_model, part_of(*QUESTIONS), count=1, length=100, seed=0)
    prompt = text_of(tiny_model, example.token_ids[: example.prompt_tokens])
    assert prompt == "Question: 0?\nAnswer: "
    assert example.counted[0] == example.prompt_tokens - 1


@pytest.mark.parametrize("shots", [None, 0])
def test_texts_that_spell_the_token_of_the_beginning_are_packed_within_the_length(
    reference_model: LoadedModel, shots: int | None
) -> None:
    model, begin = reference_model, reference_model.tokenizer.bos_token
    spelled = [Turn(begin + turn.question, turn.answer) for turn in QUESTIONS]
    plain, items = (
        packing.items(model, part_of(*turns), count=9, length=64, seed=0, shots=shots)
        for turns in (QUESTIONS, spelled)
    )
    assert max(len(item.example.token_ids) for item in items) <= 64
    first = items[0].example
    # One for each question: the tokenizer's own is left out.
    assert first.token_ids.count(model.tokenizer.bos_token_id) == len(items[0].answers)
    assert first.prompt_tokens == plain[0].example.prompt_tokens
    answers = [[first.token_ids[first.counted[i] + 1] for i in one] for one in items[0].answers]
    assert [text_of(model, tuple(ids)).strip() for ids in answers] == [
        f"{n}{n}" for n in range(len(answers))
    ]


def test_sequences_are_filled_up_to_the_length_and_never_beyond(
    reference_model: LoadedModel, data_dir: Path
) -> None:
    part = load("mathqa", data_dir).calibration
    made = packing.examples(reference_model, part, count=20, length=256, seed=0)
    lengths = [len(example.token_ids) for example in made]
    assert len(lengths) == 20
    assert max(lengths) <= 256
    assert sum(lengths) / len(lengths) > 170


def test_no_row_is_used_twice(tiny_model: LoadedModel) -> None:
    made = packing.examples(tiny_model, part_of(*QUESTIONS), count=100, length=100, seed=0)
    text = "".join(text_of(tiny_model, example.token_ids) for example in made)
    for number in range(20):
        assert text.count(f"Question: {number}?") == 1


def test_a_row_that_is_too_long_is_left_out(tiny_model: LoadedModel) -> None:
    long = Turn("Question: " + "x" * 200 + "\nAnswer:", " y")
    made = packing.examples(tiny_model, part_of(long, *QUESTIONS), count=9, length=100, seed=0)
    assert made == packing.examples(tiny_model, part_of(*QUESTIONS), count=9, length=100, seed=0)


def test_the_first_quarter_of_text_is_prompt_and_every_decode_step_counts(
    tiny_model: LoadedModel,
) -> None:
    text = "".join(f"line {number} of the text\n" for number in range(400))
    made = packing.examples(tiny_model, Part("x", text=text), count=4, length=64, seed=0)
    assert len(made) == 4
    assert len({example.token_ids for example in made}) == 4
    for example in made:
        assert len(example.token_ids) == 64
        assert example.prompt_tokens == 16
        assert example.counted == tuple(range(16, 63))
        assert text_of(tiny_model, example.token_ids) in text


def test_the_seed_decides_which_rows_are_used(tiny_model: LoadedModel, small_data: Path) -> None:
    part = load("sums", small_data).calibration

    def digest(seed: int) -> str:
        return packing.digest(packing.examples(tiny_model, part, count=2, length=128, seed=seed))

    assert digest(0) == digest(0) != digest(1)


def test_a_length_beyond_the_models_context_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(InvalidArgument, match=r"513 tokens, and .* context of 512"):
        packing.examples(tiny_model, part_of(*QUESTIONS), count=1, length=513, seed=0)


def test_a_model_that_adds_a_first_token_keeps_it_and_the_answers_stay_in_place(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from tokenizers.processors import TemplateProcessing

    from tests.tiny import BOS, byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    with_bos = replace(tiny_model, tokenizer=tokenizer)
    (plain,) = packing.examples(tiny_model, part_of(*QUESTIONS), count=1, length=99, seed=0)
    (led,) = packing.examples(with_bos, part_of(*QUESTIONS), count=1, length=100, seed=0)
    assert led.token_ids == (BOS, *plain.token_ids)
    assert led.counted == tuple(position + 1 for position in plain.counted)


def test_a_generated_context_holds_as_many_facts_as_fit(tiny_model: LoadedModel) -> None:
    part = load("recall_pair", None).calibration
    made = packing.items(tiny_model, part, count=4, length=400, seed=0)
    assert len({item.example.token_ids for item in made}) == 4
    for item in made:
        assert 250 < len(item.example.token_ids) <= 400
        text = text_of(tiny_model, item.example.token_ids)
        asked = text.count("What is")
        assert len(item.answers) == asked >= 2
        assert text_of(tiny_model, item.example.token_ids[: item.example.prompt_tokens]).endswith(
            "? "
        )


def test_too_short_a_length_for_two_facts_gives_nothing(tiny_model: LoadedModel) -> None:
    part = load("recall_pair", None).calibration
    assert packing.items(tiny_model, part, count=4, length=40, seed=0) == []


def test_answers_index_the_counted_positions(tiny_model: LoadedModel) -> None:
    (item,) = packing.items(tiny_model, part_of(*QUESTIONS), count=1, length=100, seed=0)
    ids, counted = item.example.token_ids, item.example.counted
    answers = [
        text_of(tiny_model, tuple(ids[counted[index] + 1] for index in answer))
        for answer in item.answers
    ]
    assert answers == [turn.answer.strip() for turn in QUESTIONS[: len(answers)]]
    assert item.alternatives == ()


CHOICES = [
    Turn(f"Question: {n}?\nAnswer:", f" {n}", (f" {n + 1}00", f" {n}", " none of them"))
    for n in range(10, 40)
]


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_a_question_follows_its_solved_examples_with_every_choice(
    tiny_model: LoadedModel, shots: int
) -> None:
    solved = part_of(*QUESTIONS)
    made = packing.items(
        tiny_model, part_of(*CHOICES), count=9, length=200, seed=0, shots=shots, solved=solved
    )
    assert len(made) == 9
    for turn, item in zip(CHOICES, made, strict=False):
        text = text_of(tiny_model, item.example.token_ids)
        assert text.count("Question: ") == shots + 1
        assert text.endswith(f"{turn.question}{turn.answer}\n")
        assert item.right == 1
        before = item.example.token_ids[: item.example.prompt_tokens]
        for choice, alternative in zip(turn.choices, item.alternatives, strict=True):
            assert alternative.token_ids[: alternative.prompt_tokens] == before
            whole = text_of(tiny_model, alternative.token_ids)
            assert whole == text[: text.rindex(turn.answer)] + choice
            predicted = tuple(alternative.token_ids[t + 1] for t in alternative.counted)
            assert text_of(tiny_model, predicted) == choice.strip()


def test_worked_solutions_are_not_judged_word_by_word(tiny_model: LoadedModel) -> None:
    worked = Turn("Question: 1?\nAnswer:", " first\nthen 2")
    (item,) = packing.items(
        tiny_model, part_of(worked), count=1, length=100, seed=0, shots=0, solved=None
    )
    assert item.answers == ()
    assert len(item.example.counted) == len("first\nthen 2")
