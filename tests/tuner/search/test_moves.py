"""The climb: a planted table is found, noise is not, and replays and orders are what they claim."""

from itertools import takewhile
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from a2sf.schema import UniformSetting
from tests.tuner.planted import SPEC, Clock, Planted, Timed, table, trials_of
from tuner.search.moves import CoordinateSearch, stepped
from tuner.search.space import LOG_TAU_MAX, Setting, alpha_of
from tuner.search.trials import Trials
from tuner.search.uniform import best_uniform

START = SPEC.uniform(UniformSetting(alpha=0.9, recent_share=0.25, sinks=4))
BY_LAYER = table((0.0, 0.0), (0.9, 0.9), (0.995, 0.995))
BY_HEAD = table((0.0, 0.9), (0.99, 0.9), (0.9, 1.0))


def layers_of(setting: Setting) -> list[float]:
    """The mean share of each layer."""
    return [sum(row) / len(row) for row in setting.head_share]


def climb(
    planted: Planted, *stages: str, most: int = 1000, storage: Any = None
) -> CoordinateSearch:
    trials = trials_of(planted, storage)
    with trials.stage("start", 1):
        (start,) = trials.measure("start", [START])
    found = CoordinateSearch(trials, start)
    for stage in stages:
        with trials.stage(stage, most):
            getattr(found, stage)()
            most = trials.trials_left
    return found


def test_each_layers_alpha_is_found() -> None:
    assert climb(Planted(BY_LAYER), "layers").best.setting == BY_LAYER


def test_each_heads_alpha_is_found_and_several_are_taken_together() -> None:
    assert climb(Planted(BY_HEAD), "heads").best.setting == BY_HEAD
    both = table((0.0, 0.99), (0.9, 0.9), (0.9, 0.9))
    planted = Planted(both)
    assert climb(planted, "heads").best.setting == both
    # Layer 0: two heads of five values, one of them the start's own or not, and both at once.
    together = [policy for policy, _ in planted.calls if policy.alpha == both.alpha]
    assert together


def test_heads_with_higher_costs_get_more_slots() -> None:
    target = table(*START.alpha, share=(0.5, 2.0, 0.5))
    found = climb(Planted(target), "slots").best.setting
    assert layers_of(found) == pytest.approx((0.5, 2.0, 0.5), rel=0.2)
    assert found.alpha == START.alpha


def test_protection_is_chosen_again() -> None:
    target = Setting(START.alpha, START.head_share, 0.5, 0)
    assert climb(Planted(target), "protection").best.setting == target


def test_polishing_goes_between_the_values_of_the_first_rounds() -> None:
    target = Setting(((0.85, 0.93), (0.9, 0.6), (0.97, 0.9)), START.head_share, 0.3, 4)
    planted = Planted(target)
    found = climb(planted, "polish").best.setting
    assert planted.exact(found) < 0.05 * planted.exact(START)
    assert found.head_share == START.head_share


def test_polishing_changes_slots_only_if_they_are_unequal() -> None:
    target = table(*START.alpha, share=(0.6, 1.8, 0.6))
    assert climb(Planted(target), "polish").best.setting.head_share == START.head_share
    planted = Planted(target)
    polished = climb(planted, "slots", "polish").best.setting
    assert layers_of(polished) == pytest.approx(layers_of(target), rel=0.15)


def test_the_start_is_kept_if_no_setting_costs_less() -> None:
    found = climb(Planted(START), "slots", "layers", "heads", "protection", "polish")
    assert found.best.setting == START


def test_the_heads_of_the_layer_that_matters_most_come_first() -> None:
    class OneLayer(Planted):
        def exact(self, policy: Any) -> float:
            return 5 * super().exact(policy) if policy.alpha[1] != (0.9, 0.9) else 0.1

    planted = OneLayer(START)
    trials = trials_of(planted)
    with trials.stage("start", 1):
        (start,) = trials.measure("start", [START])
    found = CoordinateSearch(trials, start)
    with trials.stage("layers", 100):
        found.layers()
    with trials.stage("heads", 1):
        before = len(planted.calls)
        found.heads()
    changed = planted.calls[before][0].alpha
    assert changed[1] != START.alpha[1]


def test_a_search_run_again_measures_nothing_and_ends_the_same() -> None:
    storage = InMemoryStorage()
    stages = ("slots", "layers", "heads", "protection", "polish")
    first = Planted(BY_HEAD, own=0.01)
    best = climb(first, *stages, most=150, storage=storage).best
    again = Planted(BY_HEAD, own=0.01)
    assert climb(again, *stages, most=150, storage=storage).best.setting == best.setting
    assert first.calls
    assert again.calls == []


@pytest.mark.parametrize("fewer", [1, 9, 60])
def test_a_search_continues_with_more_trials(fewer: int) -> None:
    """What it comes to is what it would have come to with that many from the start."""
    storage = InMemoryStorage()
    stages = ("slots", "layers", "heads", "polish")
    climb(Planted(BY_HEAD, own=0.01), *stages, most=fewer, storage=storage)
    planted, whole = Planted(BY_HEAD, own=0.01), Planted(BY_HEAD, own=0.01)
    gone_on = climb(planted, *stages, most=150, storage=storage).best.setting
    assert gone_on == climb(whole, *stages, most=150).best.setting
    assert len(planted.calls) < len(whole.calls) or fewer == 1


def timed_fit(clock: Clock, storage: Any, minutes: float) -> tuple[Trials, Timed, CoordinateSearch]:
    """The bar and all coordinate stages, where an example takes a tenth of a second."""
    planted = Timed(clock, 0.1, BY_HEAD)
    trials = trials_of(planted, storage, minutes)
    _, best = best_uniform(trials, 500)
    found = CoordinateSearch(trials, best)
    most = 500
    for stage in ("slots", "layers", "heads", "protection", "polish"):
        with trials.stage(stage, most):
            getattr(found, stage)()
            most = trials.trials_left
    return trials, planted, found


@pytest.mark.parametrize("minutes", [0.5, 2])
def test_the_time_ends_every_stage_and_a_third_is_left_for_the_proof(
    clock: Clock, minutes: float
) -> None:
    trials, _, _ = timed_fit(clock, None, minutes)
    # No more than the trial that was under way, and what a rung of the grid takes at the least.
    assert trials.seconds_spent < 40 * minutes + 2 * 3.2
    assert trials.seconds_left > 20 * minutes - 2 * 3.2
    assert trials.stage_totals["slots"].trials > 0


def test_a_search_ended_by_the_time_continues_with_more_time(clock: Clock) -> None:
    storage = InMemoryStorage()
    first, measured, found = timed_fit(clock, storage, 0.5)
    again, nothing, same = timed_fit(clock, storage, 0.5)
    assert nothing.calls == []
    assert same.best.setting == found.best.setting
    assert again.seconds_spent == pytest.approx(first.seconds_spent)
    more, further, _ = timed_fit(clock, storage, 1.5)
    assert more.seconds_spent > first.seconds_spent
    grid = list(takewhile(lambda call: len(call[1]) == 8, measured.calls))
    rest = list(takewhile(lambda call: len(call[1]) == 8, further.calls))
    assert grid
    assert rest
    assert not set(grid) & set(rest)


def test_trials_end_a_stage_in_the_middle() -> None:
    planted = Planted(BY_HEAD)
    found = climb(planted, "layers", "heads", most=13)
    tables = {policy for policy, _ in planted.calls} - {SPEC.policy(START)}
    assert len(tables) <= 13
    assert planted.exact(found.best.setting) <= planted.exact(START)


def test_a_step_stops_at_the_ends_of_the_scale() -> None:
    assert stepped(0.0, -1.0) == 0.0
    assert stepped(1.0, 1.0) == 1.0
    assert stepped(0.0, 1.0) == alpha_of(1.0)
    assert stepped(1.0, -1.0) == alpha_of(LOG_TAU_MAX - 1.0)
