"""Generated questions: equal by seed, asked in one split only, answered by their contexts."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

import pytest

from tuner.data.generated import (
    ADJECTIVES,
    NOUNS,
    RECALL_FORMS,
    Episode,
    RecallForm,
    Split,
    arith_episode,
    copy_episode,
    recall_episode,
    split_of,
    state_episode,
)

SPLITS: tuple[Split, ...] = ("train", "calibration", "validation")


EPISODES: dict[str, Callable[..., Episode]] = {
    "recall": recall_episode,
    "state": state_episode,
    "arith": arith_episode,
    "copy": copy_episode,
}


@pytest.mark.parametrize("name", sorted(EPISODES))
@pytest.mark.parametrize("split", SPLITS)
def test_equal_seeds_give_equal_questions(name: str, split: Split) -> None:
    first = [EPISODES[name](Random(7), split=split, facts=20) for _ in range(3)]
    assert first[0] == first[1] == first[2]
    assert first[0] != EPISODES[name](Random(8), split=split, facts=20)


@pytest.mark.parametrize("form", RECALL_FORMS)
def test_recall_is_asked_in_its_split_and_stated_once_in_the_context(form: RecallForm) -> None:
    asked: dict[Split, set[tuple[str, str]]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(150):
            episode = recall_episode(Random(seed), split=split, facts=12, form=form)
            [(question, answer)] = episode.turns
            key = re.split(r"Ask: | of the ", question)[-1].rstrip("?")
            value = answer.strip()
            stated = re.findall(rf"\b{key}(?: is)? (\d+)", episode.context)
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
        episode = state_episode(
            Random(seed), split="validation", facts=20, questions=3, form="value"
        )
        for question, answer in episode.turns:
            key = question.removesuffix("?").split()[-1]
            history = re.findall(rf"The {key} (?:is now|starts at) (\d+)\.", episode.context)
            assert history[-1] == answer.strip()
            assert split_of("state", key, history[-1]) == "validation"


def test_state_answers_with_the_last_thing_taken() -> None:
    for seed in range(50):
        episode = state_episode(Random(seed), split="train", facts=20, questions=3, form="held")
        for question, answer in episode.turns:
            name = question.split()[2]
            history = re.findall(rf"{name} took the (\w+)\.", episode.context)
            assert history[-1] == answer.strip()
            assert split_of("state", name, history[-1]) == "train"


def test_only_a_talk_contains_earlier_questions() -> None:
    for form in ("sentence", "pair", "story", "talk"):
        for seed in range(30):
            episode = recall_episode(Random(seed), split="train", facts=20, questions=5, form=form)
            before = re.findall(r"\n(What is .*\?)( \d+)", episode.context)
            again = [(question.strip(), answer) for question, answer in episode.turns]
            assert len(again) == 5
            assert sorted(before) == (sorted(again) if form == "talk" else [])


def test_state_answers_with_the_count_after_all_gains_and_losses() -> None:
    for seed in range(50):
        episode = state_episode(
            Random(seed), split="calibration", facts=20, questions=3, form="counter"
        )
        for question, answer in episode.turns:
            key = question.removesuffix("?").split()[-1]
            [start] = re.findall(rf"The {key} holds (\d+) coins", episode.context)
            gains = episode.context.count(f"The {key} gains one coin.")
            losses = episode.context.count(f"The {key} loses one coin.")
            assert int(start) + gains - losses == int(answer)
            assert split_of("state", key, answer.strip()) == "calibration"


def test_arith_answers_with_the_sum_of_the_two_prices() -> None:
    for seed in range(50):
        episode = arith_episode(Random(seed), split="train", facts=10, questions=2)
        prices = dict(re.findall(r"The (\w+) costs (\d+)\.", episode.context))
        for question, answer in episode.turns:
            first, second = re.findall(r"the (\w+)", question)
            a, b = int(prices[first]), int(prices[second])
            assert answer == f" {a} + {b} = {a + b}"
            assert split_of("arith", first, prices[first], second, prices[second]) == "train"


def test_copy_repeats_its_words() -> None:
    episode = copy_episode(Random(3), split="train", facts=9, questions=2)
    for question, answer in episode.turns:
        assert episode.context == question.strip() + answer + "."


def test_the_largest_recall_contexts_have_distinct_keys() -> None:
    assert len(NOUNS) == len(set(NOUNS))
    assert len(ADJECTIVES) == len(set(ADJECTIVES))
    for form in RECALL_FORMS:
        recall_episode(Random(0), split="train", facts=120, form=form)
