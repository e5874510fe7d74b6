"""Measuring in batches: giving up early, what counts as a gain, and the account of it."""

from dataclasses import replace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage

from tests.tuner.planted import SPEC, Planted, table, trials_of
from tuner.search.results import TrialResult
from tuner.search.trials import FIRST_CHECK

BEST = table((0.9, 0.9), (0.5, 0.0), (1.0, 0.99))
WORSE = table((0.0, 0.9), (0.5, 0.0), (1.0, 0.99))


def test_a_setting_that_is_clearly_worse_is_pruned_at_the_first_check() -> None:
    planted = Planted(BEST, examples=32)
    trials = trials_of(planted)
    with trials.stage("s", 9):
        (best,) = trials.measure("a", [BEST])
        (worse, same) = trials.measure("b", [WORSE, BEST], best=best)
    assert [part for _, part in planted.calls] == [
        range(32),  # nothing to compare with: measured whole
        range(FIRST_CHECK),
        *(range(FIRST_CHECK), range(FIRST_CHECK, 16), range(16, 32)),
    ]
    assert (worse.complete, len(worse.kl), worse.mean) == (False, FIRST_CHECK, np.inf)
    assert same.complete
    assert trials.stage_totals["s"].evaluations == pytest.approx(1 + FIRST_CHECK / 32 + 1)
    assert trials.stage_totals["s"].trials == 3
    assert trials.stage_totals["s"].seconds > 0


def test_a_stage_takes_no_more_trials_than_it_has() -> None:
    trials = trials_of(Planted(BEST))
    with trials.stage("s", 3):
        assert len(trials.measure("a", [BEST, WORSE])) == 2
        assert trials.trials_left == 1
        assert len(trials.measure("b", [BEST, WORSE])) == 1
        assert trials.measure("c", [BEST]) == []
    with trials.stage("t", 1):
        assert trials.trials_left == 1


def test_a_search_with_more_trials_continues_a_shorter_one() -> None:
    storage = InMemoryStorage()
    for most, measured in ((1, 1), (2, 1), (2, 0)):
        planted = Planted(BEST)
        trials = trials_of(planted, storage)
        with trials.stage("s", most):
            found = trials.measure("a", [WORSE, BEST])
        assert len(found) == most
        assert len(planted.calls) == measured


def test_the_time_ends_measurements_that_are_compared_with_a_best() -> None:
    trials = trials_of(Planted(BEST), minutes=1e-9)
    with trials.stage("s", 9):
        (best,) = trials.measure("a", [BEST])
        assert trials.trials_left == 0
        assert trials.measure("b", [WORSE], best=best) == []


def test_the_stored_layer_input_belongs_to_the_best_setting() -> None:
    planted = Planted(BEST)
    trials = trials_of(planted)
    with trials.stage("s", 9):
        (best,) = trials.measure("a", [BEST])
        trials.measure("b", [BEST.with_head(2, 0, 0.5)], best=best, from_layer=2)
    assert planted.anchors == [(SPEC.policy(BEST), 2)]


def test_a_gain_below_its_standard_error_counts_as_zero() -> None:
    rng = np.random.default_rng(0)
    before = TrialResult(BEST, rng.exponential(size=64), complete=True)
    noise = rng.normal(size=64)
    noise -= noise.mean()
    error = noise.std(ddof=1) / 8

    def after(less: float, whole: bool = True) -> TrialResult:
        return TrialResult(WORSE, before.kl - less + noise, complete=whole)

    assert after(1.1 * error).gain(before) == pytest.approx(1.1 * error)
    assert after(0.9 * error).gain(before) == 0
    assert after(-1.0).gain(before) == 0
    assert after(1.0, whole=False).gain(before) == 0


def test_a_setting_with_only_protected_slots_in_a_head_is_not_feasible() -> None:
    trials = trials_of(Planted(BEST))
    assert trials.feasible(BEST)
    # A head with a small share gets the slots that it needs, from the other heads.
    assert trials.feasible(BEST.with_layer_slots((0,), 1 / 20))
    assert not trials.feasible(replace(BEST, sinks=40))
