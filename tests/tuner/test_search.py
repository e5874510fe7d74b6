"""The scale of forgetting, the halving that finds a uniform setting, and the climb from it."""

import math
from collections.abc import Iterable, Sequence
from random import Random

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from tuner.objective import Cost
from tuner.search import (
    GRIDS,
    LOG_TAU_MAX,
    Climb,
    Frame,
    Measure,
    Rung,
    Uniform,
    alpha_of,
    alphas_of,
    best_uniform,
    ladder,
    log_tau_of,
    moves,
    params_of,
    space,
)

FRAME = Frame(num_layers=3, num_kv_heads=2, budget=None, budget_ratio=0.2, prefill_chunk=0)


@given(st.floats(0, LOG_TAU_MAX - 0.01))
def test_alpha_rises_with_tau_and_comes_back_from_it(log_tau: float) -> None:
    alpha = alpha_of(log_tau)
    assert 0 <= alpha <= 1
    # alpha is kept to six digits, which near 1 is coarse in tau.
    assert abs(alpha_of(log_tau_of(alpha)) - alpha) < 2e-6
    assert alpha_of(log_tau + 0.5) > alpha or alpha == 1


def test_exactly_0_and_exactly_1_are_on_the_scale() -> None:
    assert [alpha_of(0.0), alpha_of(LOG_TAU_MAX)] == [0.0, 1.0]
    assert [log_tau_of(0.0), log_tau_of(1.0)] == [0.0, LOG_TAU_MAX]
    assert alpha_of(math.log(10)) == 0.9


def test_every_alpha_of_every_grid_survives_the_way_through_a_trial() -> None:
    for grid in GRIDS:
        for setting in grid:
            alpha = FRAME.uniform(setting).alpha
            assert alphas_of(params_of(alpha), 3, 2) == alpha


def noisy(best: float, share: float, spread: float, calls: list[tuple[int, int]]) -> Measure:
    """Costs with one best alpha and share, and a noise that all settings have in common."""
    noise = np.random.default_rng(0).normal(scale=spread, size=64)

    def measure(settings: Sequence[Uniform], examples: int) -> Iterable[Cost]:
        calls.append((len(settings), examples))
        for setting in settings:
            exact = (log_tau_of(setting.alpha) - log_tau_of(best)) ** 2
            exact += (setting.recent_share - share) ** 2
            kl = exact + noise[:examples]
            yield Cost(kl=kl, nll=kl)

    return measure


def test_halving_finds_the_planted_setting_and_measures_fewer_on_more() -> None:
    calls: list[tuple[int, int]] = []
    rungs = (Rung(88, 8), Rung(17, 16), Rung(5, 32))
    found, cost = best_uniform(GRIDS[0], rungs, noisy(0.9, 0.25, 0.3, calls))
    assert (found.alpha, found.recent_share) == (0.9, 0.25)
    assert len(cost.kl) == 32
    assert calls == [(88, 8), (17, 16), (5, 32), (2, 32)]


def test_a_best_alpha_between_two_grid_points_is_looked_for_there() -> None:
    between = alpha_of((log_tau_of(0.9) + log_tau_of(0.95)) / 2)
    found, _ = best_uniform(GRIDS[0], ladder(32, 30)[1], noisy(between, 0.25, 0.0, []))
    assert found.alpha == between


@pytest.mark.parametrize(
    ("examples", "trials"), [(2, 0), (4, 2), (8, 30), (32, 10), (32, 30), (64, 30), (32, 300)]
)
def test_the_ladder_narrows_and_ends_on_all_examples(examples: int, trials: int) -> None:
    grid, rungs = ladder(examples, trials)
    assert rungs[0].settings == len(grid)
    assert [r.settings for r in rungs] == sorted((r.settings for r in rungs), reverse=True)
    assert [r.examples for r in rungs] == sorted(r.examples for r in rungs)
    assert rungs[-1].examples == examples
    assert rungs[-1].settings >= 3


def test_uniform_settings_get_no_less_effort_than_thirty_tables() -> None:
    grid, rungs = ladder(32, 30)
    assert len(grid) == 88
    assert sum(rung.settings * rung.examples for rung in rungs) + 2 * 32 >= 30 * 32


def climbed(seed: int, trials: int, target: dict[str, float]) -> optuna.Study:
    study = optuna.create_study(sampler=Climb(3, 2, seed))
    start = params_of(((0.9, 0.9),) * 3)

    def cost(params: dict[str, float]) -> float:
        return sum((params[name] - target[name]) ** 2 for name in target)

    study.add_trial(
        optuna.trial.create_trial(params=start, distributions=space(3, 2), value=cost(start))
    )
    study.optimize(
        lambda trial: cost({n: trial.suggest_float(n, 0.0, LOG_TAU_MAX) for n in space(3, 2)}),
        n_trials=trials,
    )
    return study


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_each_step_of_the_climb_moves_one_block_of_the_best_so_far() -> None:
    blocks = {frozenset(block) for block, _ in moves(3, 2, Random(0))}
    study = climbed(0, 40, params_of(((0.0, 1.0), (0.99, 0.5), (0.9, 0.9))))
    trials = study.get_trials()
    for number, trial in enumerate(trials[1:], start=1):
        best = min(trials[:number], key=lambda t: (t.value, t.number))
        moved = {name for name, value in trial.params.items() if value != best.params[name]}
        # At an end of the scale a member of the block may be stuck.
        assert moved
        assert any(moved <= block for block in blocks)
        assert all(0.0 <= value <= LOG_TAU_MAX for value in trial.params.values())


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 4), (6, 4), (7, 1), (32, 8)])
def test_the_moves_go_from_half_the_layers_to_every_single_head_both_ways(
    layers: int, heads: int
) -> None:
    planned = moves(layers, heads, Random(0))
    sizes = [len(block) for block, _ in planned]
    assert max(sizes) == (-(-layers // 2) * heads if layers > 1 else 1)
    assert sizes[-1] == 1
    ups = sorted(tuple(block) for block, direction in planned if direction > 0)
    downs = sorted(tuple(block) for block, direction in planned if direction < 0)
    assert ups == downs
    singles = {block[0] for block in ups if len(block) == 1}
    assert singles == set(space(layers, heads))


def test_the_climb_goes_most_of_the_way_to_a_planted_table_in_sixty_steps() -> None:
    target = params_of(((0.0, 1.0), (0.99, 0.5), (0.9, 0.9)))
    left = []
    for seed in range(5):
        study = climbed(seed, 60, target)
        left.append(study.best_value / study.get_trials()[0].value)
    assert max(left) < 0.35


def test_exact_0_and_exact_1_are_reached_by_climbing() -> None:
    study = climbed(1, 120, params_of(((0.0, 1.0), (0.0, 1.0), (0.0, 1.0))))
    reached = {alpha_of(value) for value in study.best_params.values()}
    assert {0.0, 1.0} <= reached


def test_a_move_depends_on_the_seed_and_the_trials_number_alone() -> None:
    target = params_of(((0.0, 1.0), (0.99, 0.5), (0.9, 0.9)))
    runs = [[t.params for t in climbed(seed, 10, target).get_trials()] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_without_a_start_the_climb_draws_at_random() -> None:
    study = optuna.create_study(sampler=Climb(1, 1, 0))
    study.optimize(lambda trial: trial.suggest_float("log_tau.0.0", 0.0, LOG_TAU_MAX), n_trials=1)
    assert [t.state for t in study.get_trials()] == [TrialState.COMPLETE]
