"""The needle benchmark: a prompt holds its fact, real text and its question."""

from pathlib import Path

from benchmarks import ROOT
from benchmarks.needle import HIDING_PLACES, questions, shown

TEXT = " ".join(f"word{number}" for number in range(5000))


def test_every_prompt_states_its_fact_and_asks_for_it_after_the_text() -> None:
    asked = list(questions(TEXT, 2000, 20))
    assert len({prompt for prompt, _ in asked}) == 20
    for prompt, place in asked:
        fact, _, filler, question = prompt.split("\n\n")
        assert place in HIDING_PLACES
        assert fact.endswith(f"in the {place}.")
        assert place not in question
        assert 1900 < len(filler) <= 2000
        assert set(filler.split(" ")) <= set(TEXT.split(" "))


def test_prompts_are_the_same_in_every_run() -> None:
    assert list(questions(TEXT, 500, 5)) == list(questions(TEXT, 500, 5))


def test_a_table_outside_the_repository_is_named_without_its_directory(tmp_path: Path) -> None:
    assert shown(tmp_path / "mine.json") == "mine.json"
    assert shown(ROOT / "benchmarks" / "tables" / "mine.json") == "benchmarks/tables/mine.json"
