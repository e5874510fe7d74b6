"""docs/capacity.md shows the output of its commands, and its figures come from them."""

import re
from pathlib import Path

import pytest

from tests.service.planning import planned, shown

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
OUTPUTS = re.findall(r"```console\n\$ python -m service plan (.*?)\n(.*?)```", PAGE, re.DOTALL)
SMALL, ONE, FLEET = (arguments.split() for arguments, _ in OUTPUTS)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("arguments", "output"), OUTPUTS, ids=["small", "one", "fleet"])
def test_the_page_shows_the_output_of_the_commands(arguments: str, output: str) -> None:
    assert shown(*arguments.split()) == output


def test_half_the_tokens_take_half_the_bytes_and_eight_a_slot() -> None:
    plan = planned(*SMALL)
    full_cache, half = plan["full_cache"]["sequence_bytes"], plan["this_cache"]["sequence_bytes"]
    slots = 8 * 4 * 1024
    assert full_cache == 16 * 2**20
    assert half == full_cache // 2 + 8 * slots
    assert plan["this_cache"]["scoring_multiplications"] == slots
    assert plan["this_cache"]["scoring_additions"] == 4 * slots
    assert plan["this_cache"]["attention_operations"] == 4 * 64 * 4 * slots
    # Of a slot's operations, and of its bytes.
    assert f"{5 / (4 * 64 * 4):.2%}" == "0.49%"
    assert f"{8 / (2 * 64 * 2):.1%}" == "3.1%"


def test_every_figure_on_the_page_is_an_output_or_recomputed() -> None:
    plan = planned(*ONE)
    weights, times = plan["weights"], plan["times_from"]
    pace = plan["this_cache"]["pace"]
    touched = (pace["step_nbytes"] - weights["step_nbytes"]) / plan["this_cache"]["rows"]
    compute_s = 2 * weights["step_parameters"] / times["compute"]
    memory_s = touched / times["bandwidth"]
    most = f"{1 / memory_s:,.0f} tokens/s"
    bounds = f"2P / F is {compute_s * 1e6:.0f} µs and K / B is {memory_s * 1e6:.0f} µs"
    turning = round(1024 * compute_s / memory_s, -1)
    for given in (bounds, most, f"a budget below about {turning:.0f} tokens"):
        assert given in PAGE
    assert f"1,000 tokens at the step above take {1000 * pace['step_s']:.0f} s" in PAGE
    words = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    figures = set(re.findall(r"\b\d{1,3}(?:,\d{3})+\b", words))
    outputs = set(re.findall(r"\b\d{1,3}(?:,\d{3})+\b", " ".join(text for _, text in OUTPUTS)))
    # What a slot's attention costs: 4 x 64 x 4.
    assert figures - outputs - {most.split()[0], "1,024"} == set()
    assert len(figures) > 8


def test_reading_a_prompt_takes_nearly_as_long_as_writing_the_completion() -> None:
    pace = planned(*FLEET)["this_cache"]["pace"]
    writing_s = 1000 * pace["step_s"] / pace["rows"]
    assert 0.8 < pace["prompt_s"] / writing_s < 1


def test_links_of_the_page_resolve() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
