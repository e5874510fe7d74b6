"""The bar: the grid with its halving, and the refinement around the best point."""

from random import Random

import pytest
from optuna.storages import InMemoryStorage

from a2sf.schema import UniformSetting
from tests.tuner.planted import SPEC, Clock, Planted, Timed, trials_of
from tuner.search.space import alpha_of, log_tau_of
from tuner.search.uniform import FIRST_STEPS, GRID, MIN_STEP, best_uniform, coarse_to_fine

WHOLE = 88 + 17 + 5
"""Trials that the whole grid takes with 32 examples."""


def planted(alpha: float, share: float, sinks: int, **options: float) -> Planted:
    setting = UniformSetting(alpha=alpha, recent_share=share, sinks=sinks)
    return Planted(SPEC.uniform(setting), examples=32, **options)


def test_the_grid_is_the_pinned_one() -> None:
    assert len(set(GRID)) == 88
    assert {setting.alpha for setting in GRID} >= {0.0, 0.3, 0.995, 1.0}


def test_halving_finds_the_planted_setting_and_measures_fewer_on_more() -> None:
    target = planted(0.9, 0.25, 4)
    found, best = best_uniform(trials_of(target), WHOLE)
    assert found == UniformSetting(alpha=0.9, recent_share=0.25, sinks=4)
    assert best.setting == SPEC.uniform(found)
    assert len(best.kl) == 32
    sizes = [len(part) for _, part in target.calls]
    assert sizes == [8] * 88 + [16] * 17 + [32] * 5


@pytest.mark.parametrize(("alpha", "share", "sinks"), [(0.93, 0.31, 3), (0.0, 0.0, 0), (1, 0.9, 9)])
def test_the_refinement_leaves_the_grid_for_the_best_point(
    alpha: float, share: float, sinks: int
) -> None:
    found, best = best_uniform(trials_of(planted(alpha, share, sinks)), 300)
    assert abs(log_tau_of(found.alpha) - log_tau_of(alpha)) < 2 * MIN_STEP
    assert found.recent_share == pytest.approx(share, abs=0.05)
    assert abs(found.sinks - sinks) <= 1
    assert best.setting == SPEC.uniform(found)


def test_the_refinement_takes_no_more_trials_than_tables_may() -> None:
    between = alpha_of((log_tau_of(0.9) + log_tau_of(0.95)) / 2)
    trials = trials_of(planted(between, 0.3, 2))
    best_uniform(trials, WHOLE + 7)
    assert trials.stage_totals["uniform"].trials == WHOLE + 7
    assert trials.notes == []


@pytest.mark.parametrize("most", [0, 1, 2, 6, 12, 40, WHOLE - 1])
def test_few_trials_go_to_the_first_settings_of_the_grid(most: int) -> None:
    target = planted(0.9, 0.25, 4)
    trials = trials_of(target)
    _, best = best_uniform(trials, most)
    assert trials.stage_totals["uniform"].trials <= max(most, 1)
    assert len(best.kl) == 32
    order = [SPEC.policy(SPEC.uniform(one)) for one in coarse_to_fine(GRID)]
    tried = list(dict.fromkeys(policy for policy, _ in target.calls if policy in order))
    assert tried == order[: len(tried)]
    assert len(tried) >= 0.7 * most
    (note,) = trials.notes
    assert note.startswith("The best uniform setting is the best of ")
    assert "the whole grid takes 110" in note


def test_the_first_settings_of_the_grid_stand_for_all_others() -> None:
    """The best of a hundred random choices of as many is no more than a little nearer."""
    order = coarse_to_fine(GRID)
    assert sorted(map(repr, order)) == sorted(map(repr, GRID))

    def far(chosen: list[UniformSetting]) -> float:
        def steps(one: UniformSetting, other: UniformSetting) -> float:
            apart = (
                log_tau_of(one.alpha) - log_tau_of(other.alpha),
                one.recent_share - other.recent_share,
                one.sinks - other.sinks,
            )
            return sum(abs(a) / step for a, step in zip(apart, FIRST_STEPS, strict=True))

        return sum(min(steps(one, other) for other in chosen) for one in GRID) / len(GRID)

    rng = Random(0)
    for count in (1, 2, 4, 9, 20):
        assert far(order[:count]) < 1.15 * min(far(rng.sample(GRID, count)) for _ in range(100))


def test_the_time_makes_the_grid_coarser_and_a_half_of_it_is_left_to_the_tables(
    clock: Clock,
) -> None:
    # A row takes .1 s: the whole grid would take 109 s, and 20 s are the bar's.
    trials = trials_of(Timed(clock, 0.1), minutes=1)
    _, best = best_uniform(trials, 500)
    assert len(best.kl) == 32
    assert 14 < trials.seconds_spent < 20 + 3.2
    assert trials.notes


def test_one_uniform_setting_is_measured_however_short_the_time(clock: Clock) -> None:
    trials = trials_of(Timed(clock, 100.0), minutes=1)
    _, best = best_uniform(trials, 500)
    assert len(best.kl) == 32
    assert trials.stage_totals["uniform"].trials == 3


@pytest.mark.parametrize(("examples", "sizes"), [(2, [2] * 88), (3, [2] * 88 + [3] * 5)])
def test_few_examples_are_not_measured_twice(examples: int, sizes: list[int]) -> None:
    target = Planted(SPEC.uniform(GRID[40]), examples=examples)
    assert best_uniform(trials_of(target), len(sizes))[0] == GRID[40]
    assert [len(part) for _, part in target.calls] == sizes


def test_the_refinement_continues_with_more_trials() -> None:
    storage = InMemoryStorage()
    best_uniform(trials_of(planted(0.93, 0.31, 3), storage), WHOLE + 3)
    more = planted(0.93, 0.31, 3)
    found = best_uniform(trials_of(more, storage), 300)[0]
    assert found == best_uniform(trials_of(planted(0.93, 0.31, 3)), 300)[0]
    assert len(more.calls) < 300 - WHOLE


def test_the_steps_shrink_until_the_refinement_ends() -> None:
    trials = trials_of(planted(0.9, 0.25, 4))
    found, _ = best_uniform(trials, 1000)
    assert found == UniformSetting(alpha=0.9, recent_share=0.25, sinks=4)
    assert trials.stage_totals["uniform"].trials < 88 + 17 + 5 + 50
