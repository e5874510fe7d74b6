"""The bar: the grid with its halving, and the refinement around the best point."""

import pytest
from optuna.storages import InMemoryStorage

from a2sf.schema import UniformSetting
from tests.tuner.planted import FRAME, Planted, trials_of
from tuner.search import alpha_of, log_tau_of
from tuner.uniform import GRID, LEAST_STEP, best_uniform


def planted(alpha: float, share: float, sinks: int, **options: float) -> Planted:
    setting = UniformSetting(alpha=alpha, recent_share=share, sinks=sinks)
    return Planted(FRAME.uniform(setting), examples=32, **options)


def test_the_grid_is_the_pinned_one() -> None:
    assert len(set(GRID)) == 88
    assert {setting.alpha for setting in GRID} >= {0.0, 0.3, 0.995, 1.0}


def test_halving_finds_the_planted_setting_and_measures_fewer_on_more() -> None:
    target = planted(0.9, 0.25, 4)
    found, best = best_uniform(trials_of(target), 0)
    assert found == UniformSetting(alpha=0.9, recent_share=0.25, sinks=4)
    assert best.setting == FRAME.uniform(found)
    assert len(best.kl) == 32
    sizes = [len(part) for _, part in target.calls]
    assert sizes == [8] * 88 + [16] * 17 + [32] * 5


@pytest.mark.parametrize(("alpha", "share", "sinks"), [(0.93, 0.31, 3), (0.0, 0.0, 0), (1, 0.9, 9)])
def test_the_refinement_leaves_the_grid_for_the_best_point(
    alpha: float, share: float, sinks: int
) -> None:
    found, best = best_uniform(trials_of(planted(alpha, share, sinks)), 300)
    assert abs(log_tau_of(found.alpha) - log_tau_of(alpha)) < 2 * LEAST_STEP
    assert found.recent_share == pytest.approx(share, abs=0.05)
    assert abs(found.sinks - sinks) <= 1
    assert best.setting == FRAME.uniform(found)


def test_the_refinement_takes_no_more_trials_than_tables_may() -> None:
    between = alpha_of((log_tau_of(0.9) + log_tau_of(0.95)) / 2)
    trials = trials_of(planted(between, 0.3, 2))
    best_uniform(trials, 7)
    assert trials.accounts["uniform"].trials == 88 + 17 + 5 + 7


@pytest.mark.parametrize(("examples", "sizes"), [(2, [2] * 88), (3, [2] * 88 + [3] * 5)])
def test_few_examples_are_not_measured_twice(examples: int, sizes: list[int]) -> None:
    target = Planted(FRAME.uniform(GRID[40]), examples=examples)
    assert best_uniform(trials_of(target), 0)[0] == GRID[40]
    assert [len(part) for _, part in target.calls] == sizes


def test_the_refinement_goes_on_with_more_trials() -> None:
    storage = InMemoryStorage()
    best_uniform(trials_of(planted(0.93, 0.31, 3), storage), 3)
    found = best_uniform(trials_of(planted(0.93, 0.31, 3), storage), 300)[0]
    assert found == best_uniform(trials_of(planted(0.93, 0.31, 3)), 300)[0]


def test_where_nothing_is_better_the_steps_shrink_and_it_ends() -> None:
    trials = trials_of(planted(0.9, 0.25, 4))
    found, _ = best_uniform(trials, 1000)
    assert found == UniformSetting(alpha=0.9, recent_share=0.25, sinks=4)
    assert trials.accounts["uniform"].trials < 88 + 17 + 5 + 50
