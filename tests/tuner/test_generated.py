"""Generated questions: equal by seed, asked in one split only, answered by their contexts."""

from __future__ import annotations

import re
from random import Random

import pytest

from tuner.generated import (
    ADJECTIVES,
    GENERATORS,
    NOUNS,
    RECALL_FORMS,
    RecallForm,
    Split,
    arith_episode,
    copy_episode,
    is_exact,
    recall,
    recall_episode,
    split_of,
    state_episode,
)

SPLITS: tuple[Split, ...] = ("train", "calibration", "validation")


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("split", SPLITS)
def test_equal_seeds_give_equal_questions(name: str, split: Split) -> None:
    first = [GENERATORS[name](Random(7), split=split) for _ in range(3)]
    assert first[0] == first[1] == first[2]
    assert first[0] != GENERATORS[name](Random(8), split=split)


@pytest.mark.parametrize("form", RECALL_FORMS)
def test_recall_is_asked_in_its_split_and_stated_once_in_the_context(form: RecallForm) -> None:
    asked: dict[Split, set[tuple[str, str]]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(150):
            question = recall(Random(seed), split=split, facts=12, form=form)
            key = re.split(r"Ask: | of the ", question.question)[-1].rstrip("?")
            value = question.answer.strip()
            stated = re.findall(rf"\b{key}(?: is)? (\d+)", question.context)
            assert stated == [value]
            assert split_of("recall", key, value) == split
            asked[split].add((key, value))
    for one, other in (("train", "validation"), ("train", "calibration")):
        assert not asked[one] & asked[other]  # type: ignore[index]
    assert not asked["calibration"] & asked["validation"]


def test_every_turn_of_an_episode_belongs_to_its_split() -> None:
    episode = recall_episode(
        Random(0), split="calibration", facts=20, questions=20, form="sentence"
    )
    assert len(episode.turns) == len({question for question, _ in episode.turns}) == 20
    for question, answer in episode.turns:
        key = question.removesuffix("?").split(" of the ")[-1]
        assert split_of("recall", key, answer.strip()) == "calibration"


def test_neither_word_of_a_pair_identifies_the_fact_alone() -> None:
    context = recall_episode(Random(1), split="train", facts=24, form="pair").context
    keys = re.findall(r"of the (\w+) (\w+) is", context)
    assert len(set(keys)) == 24
    assert len({adjective for adjective, _ in keys}) < 24 > len({noun for _, noun in keys})


def test_state_answers_with_the_last_value() -> None:
    for seed in range(50):
        episode = state_episode(Random(seed), split="validation", facts=20, questions=3)
        for question, answer in episode.turns:
            key = question.removesuffix("?").split()[-1]
            history = re.findall(rf"The {key} (?:is now|starts at) (\d+)\.", episode.context)
            assert history[-1] == answer.strip()
            assert split_of("state", key, history[-1]) == "validation"


def test_arith_answers_with_the_sum_of_the_two_prices() -> None:
    for seed in range(50):
        episode = arith_episode(Random(seed), split="train", facts=10, questions=2)
        prices = dict(re.findall(r"The (\w+) costs (\d+)\.", episode.context))
        for question, answer in episode.turns:
            first, second = re.findall(r"the (\w+)", question)
            assert int(prices[first]) + int(prices[second]) == int(answer)
            assert split_of("arith", first, prices[first], second, prices[second]) == "train"


def test_copy_repeats_its_words() -> None:
    episode = copy_episode(Random(3), split="train", facts=9, questions=2)
    for question, answer in episode.turns:
        assert episode.context == question.strip() + answer + "."


def test_the_largest_recall_contexts_have_distinct_keys() -> None:
    assert len(NOUNS) == len(set(NOUNS))
    assert len(ADJECTIVES) == len(set(ADJECTIVES))
    for form in RECALL_FORMS:
        facts = 120 if form in ("list", "sentence") else 999
        recall(Random(0), split="train", facts=facts // 2, form=form)
        recall_episode(Random(0), split="train", facts=120, form=form)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (" 412", " 412", True),
        (" 412.\nWhat", " 412", True),
        (" 41", " 412", False),
        ("", " 412", False),
        (" lamp 3 dog", " lamp 3", True),
        (" lamp 4", " lamp 3", False),
    ],
)
def test_exact_match_compares_the_words_of_the_answer(
    completion: str, answer: str, expected: bool
) -> None:
    assert is_exact(completion, answer) is expected
