"""The smallest budget near the full cache: found, or not, and stated in a sentence."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.schema import Estimate
from service.config.options import MIN_BUDGET
from tests.tuner.commands import run
from tuner.budget import BudgetSettings, max_measurements, search, smallest
from tuner.data import packing
from tuner.data.datasets import load
from tuner.evaluation import statistics
from tuner.evaluation.objective import Objective
from tuner.evaluation.policy_specs import parse
from tuner.evaluation.results import Size
from tuner.report.budget_answer import SERVER_FLOOR, BudgetSearch, answer, lines


@given(st.integers(1, 60), st.integers(1, 99), st.integers(0, 120))
def test_bisection_finds_the_same_budget_as_a_full_search(
    first: int, width: int, threshold: int
) -> None:
    steps = range(first, first + width)
    asked: list[int] = []

    def within(step: int) -> bool:
        asked.append(step)
        return step >= threshold

    found = smallest(steps, within)
    assert found == next((step for step in steps if step >= threshold), None)
    assert len(asked) == len(set(asked)) <= max_measurements(width)
    if found is None:
        assert asked == [steps[-1]]


@pytest.fixture
def settings(small_data: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {
        "dataset": "sums",
        "policy": "a2sf:.9:0:0",
        "within": 0.1,
        "up_to": 1.0,
        "examples": 8,
        "length": 128,
        "split": "validation",
        "prefill_chunk": 0,
        "seed": 0,
        "data_dir": small_data,
        "model": str(tiny_model_dir),
        "revision": None,
        "device": "cpu",
        "dtype": "float32",
        "command": "",
    }


def test_the_budget_found_is_within_and_the_next_smaller_is_not(
    settings: dict[str, Any], tiny_model: LoadedModel, small_data: Path
) -> None:
    found = search(BudgetSettings(**settings))
    assert found.ratio is not None
    assert 0.01 < found.ratio < 0.99
    by_ratio = {one.ratio: one for one in found.measured}
    below = by_ratio[round(found.ratio - 0.01, 9)]
    assert by_ratio[found.ratio].perplexity.high <= 0.1 < below.perplexity.high
    for one in found.measured:
        assert one.within == (one.ratio >= found.ratio) == (one.perplexity.high <= 0.1)
    # By hand: the same examples, the paired difference, the exponential.
    part = load("sums", small_data).validation
    examples = packing.examples(tiny_model, part, count=8, length=128, seed=0)
    seen = Objective(tiny_model, examples, label="")
    (policy,) = parse("a2sf:.9:0:0", tiny_model)
    cost = seen.cost(policy.at(Size(ratio=found.ratio), prefill_chunk=0, seed=0))
    more = statistics.difference(cost.nll, seen.full_nll)
    chosen = by_ratio[found.ratio]
    assert chosen.nll.high == pytest.approx(more.high, abs=1e-6)
    assert chosen.perplexity.high == pytest.approx(math.exp(more.high) - 1, abs=1e-6)
    assert chosen.kl.mean == pytest.approx(cost.mean, rel=1e-4)
    assert chosen.slots == np.mean([round(found.ratio * len(e.token_ids)) for e in examples])
    sentence = answer(found)
    assert sentence.startswith(
        "The smallest budget that keeps a2sf:.9:0:0 within 10 % of the full cache's perplexity on "
        f"sums is {found.ratio:g} of the length ("
    )
    low, high = (100 * x for x in (below.perplexity.low, below.perplexity.high))
    assert sentence.endswith(
        f"at {below.ratio:g} it is {100 * below.perplexity.mean:+.2f} % [{low:+.2f}, {high:+.2f}]."
    )
    assert sentence.count(". ") == 0


def test_the_smallest_possible_budget_is_named_as_such(
    settings: dict[str, Any],
) -> None:
    found = search(BudgetSettings(**{**settings, "within": 0.99}))
    lowest = found.measured[-1].model_copy(update={"ratio": 0.01, "within": True})
    sentence = answer(found.model_copy(update={"ratio": 0.01, "measured": (lowest,)}))
    assert sentence.endswith(" there, and no smaller budget was considered.")


@given(st.sets(st.integers(1, 60)), st.integers(1, 60))
def test_bisection_ends_at_a_step_that_is_within_above_one_that_is_not(
    within: set[int], first: int
) -> None:
    steps = range(first, 61)
    found = smallest(steps, within.__contains__)
    if found is None:
        assert 60 not in within
    else:
        assert found in within
        assert found == first or found - 1 not in within


def test_if_no_budget_is_within_the_limit_the_answer_is_one_sentence(
    settings: dict[str, Any],
) -> None:
    found = search(BudgetSettings(**{**settings, "within": 1e-7, "up_to": 0.3}))
    assert found.ratio is None
    (top,) = found.measured
    assert top.ratio == 0.3
    assert answer(found).startswith(
        "No budget up to 0.3 of the length keeps a2sf:.9:0:0 within 1e-05 % of the full cache's "
        "perplexity on sums: at 0.3 perplexity is "
    )
    assert answer(found).endswith("try a larger --up-to.")


@pytest.mark.parametrize("up_to", [0.99, 0.995, 1.0])
def test_no_larger_up_to_is_suggested_if_the_largest_budget_was_measured(
    settings: dict[str, Any], up_to: float
) -> None:
    found = search(BudgetSettings(**{**settings, "within": 0.1, "up_to": up_to}))
    (top,) = [one for one in found.measured if one.ratio == 0.99]
    failed = found.model_copy(update={"within": -1.0, "measured": (top,), "ratio": None})
    assert answer(failed).endswith("; only a cache without eviction is within it.")


def test_more_examples_are_suggested_if_only_the_mean_is_within_the_limit(
    settings: dict[str, Any],
) -> None:
    found = search(BudgetSettings(**{**settings, "up_to": 0.3, "within": 1e-7}))
    (top,) = found.measured
    between = (top.perplexity.mean + top.perplexity.high) / 2
    sentence = answer(found.model_copy(update={"within": between}))
    assert sentence.endswith(
        "its mean is within it, so more --examples may show it; otherwise try a larger --up-to."
    )


def test_budgets_too_small_for_the_protected_tokens_are_skipped(settings: dict[str, Any]) -> None:
    found = search(BudgetSettings(**{**settings, "policy": "a2sf:.9:40:4", "within": 0.99}))
    assert found.ratio is not None
    assert min(one.ratio for one in found.measured) * 128 >= 44
    with pytest.raises(InvalidArgument, match=r"^--up-to: 0.2 leaves a2sf:.9:40:4 no room"):
        search(BudgetSettings(**{**settings, "policy": "a2sf:.9:40:4", "up_to": 0.2}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("full",), "POLICY: 'full' keeps every token; accepted: one table or policy"),
        (("a2sf",), "POLICY: 'a2sf' is 12 policies; accepted: one table or policy"),
        (("h2oo",), "alpha table; did you mean h2o?"),
        (("h2o", "--within", "1"), "--within: '1'; accepted: percent such as 1%, or a share"),
        (("h2o", "--within", "near"), "--within: 'near'; accepted: percent such as 1%"),
        (("h2o", "--up-to", "1.5"), "--up-to: 1.5; accepted: .01 to 1"),
        (("h2o", "--split", "validate"), "accepted: validation, calibration; did you mean valid"),
        (("h2o", "--examples", 999), "lower --examples"),
    ],
)
def test_mistakes_of_the_user_are_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_data: Path,
    tiny_model_dir: Path,
    flags: tuple[object, ...],
    message: str,
) -> None:
    data = ("--dataset", "sums", "--data-dir", small_data, "--model", tiny_model_dir)
    code, out, line = run(monkeypatch, capsys, "budget", *flags, "--length", 128, *data)
    assert (code, out) == (2, "")
    assert message in line


def test_the_command_prints_the_sentence_the_table_and_the_document(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_data: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    out_json = tmp_path / "new" / "budget.json"
    code, out, _ = run(
        monkeypatch,
        capsys,
        *("budget", "h2o", "--within", "20%", "--dataset", "sums", "--data-dir", small_data),
        *("--model", tiny_model_dir, "--examples", 4, "--length", 128, "--json", out_json),
    )
    assert code == 0
    found = BudgetSearch.model_validate_json(out_json.read_text(encoding="utf-8"))
    printed = out.splitlines()
    assert printed[0] == answer(found)
    assert printed[1].startswith("Few examples: 4 give rough limits")
    assert printed[2].startswith("A server keeps at least --min-budget tokens, 128 by default")
    rows = [line.split() for line in printed if re_row(line)]
    assert [float(row[0]) for row in rows] == [one.ratio for one in found.measured]
    assert [row[-1] for row in rows] == ["yes" if one.within else "no" for one in found.measured]
    assert str(tmp_path) not in found.command


def test_an_answer_below_the_floor_of_a_server_says_so(settings: dict[str, Any]) -> None:
    found = search(BudgetSettings(**{**settings, "within": 0.99}))
    assert SERVER_FLOOR == MIN_BUDGET
    floor = f"A server keeps at least --min-budget tokens, {MIN_BUDGET} by default"

    def said(slots: float, ratio: float | None = found.ratio) -> bool:
        measured = tuple(one.model_copy(update={"slots": slots}) for one in found.measured)
        changed = found.model_copy(update={"measured": measured, "ratio": ratio})
        return any(line.startswith(floor) for line in lines(changed))

    assert said(MIN_BUDGET - 1)
    assert not said(MIN_BUDGET)


def test_columns_of_large_figures_do_not_touch(settings: dict[str, Any]) -> None:
    found = search(BudgetSettings(**{**settings, "within": 0.99}))
    large = Estimate(mean=11.8281, low=10.478, high=13.1781)
    measured = tuple(
        one.model_copy(update={"kl": large, "perplexity": large}) for one in found.measured
    )
    rows = [line for line in lines(found.model_copy(update={"measured": measured})) if re_row(line)]
    for row in rows:
        assert "  +1182.81 % [+1047.80, +1317.81]  11.8281 [10.4780, 13.1781]  " in row


def re_row(line: str) -> bool:
    return line[:4].strip().startswith("0.")
