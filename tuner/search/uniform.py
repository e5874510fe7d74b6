"""Finds the best uniform setting: one alpha for all heads and equal slots in all layers.

Owns the grid and its order, its successive halving, and the refinement around the best point. Knows
nothing of tables. This baseline must be as strong as its three numbers allow, because tables are
judged by it.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from a2sf.schema import UniformSetting
from tuner.search.halving import rungs, successive_halving
from tuner.search.results import TrialResult
from tuner.search.space import LOG_TAU_MAX, alpha_of, log_tau_of
from tuner.search.trials import Trials

GRID = tuple(
    UniformSetting(alpha=float(alpha), recent_share=share, sinks=sinks)
    for alpha, share, sinks in product(
        (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1), (0.0, 0.125, 0.25, 0.5), (0, 4)
    )
)
"""88 settings."""

FIRST_STEPS = (0.35, 0.125, 4)
"""First steps of log tau (about half of the distance between two grid points), recent share and
sinks."""

MIN_STEP = 0.02
"""Smallest step of log tau: a factor of 1.02 in the length of memory."""


TIME_SHARE = 0.4
"""Largest share of the search time."""


def best_uniform(trials: Trials, max_trials: int) -> tuple[UniformSetting, TrialResult]:
    """Find the best uniform setting on all examples, with at most `most` trials, at least one.

    The grid is halved on growing shares of the examples. Then a pattern search (Hooke and Jeeves,
    1961) steps from the winner in alpha, recent share and sinks, with smaller and smaller steps,
    until trials or time end or the steps are below the minimum. If trials or time are short, the
    grid is coarser.
    """
    grid = coarse_to_fine(GRID)
    max_trials = max(max_trials, 1)
    with trials.stage("uniform", max_trials, TIME_SHARE):
        settings = [trials.spec.uniform(one) for one in grid]
        best = successive_halving(trials, "grid", settings, max_trials, min_settings=1)[0]
        taken = trials.stage_totals["uniform"].trials
        whole_grid = sum(count for count, _ in rungs(len(grid), len(trials.objective.examples)))
        if taken < whole_grid:
            trials.notes.append(
                f"The best uniform setting is the best of {taken} trials; the whole grid takes "
                f"{whole_grid}, so more --trials or --minutes may improve this baseline."
            )
        return _refine(trials, best)


def coarse_to_fine(grid: Sequence[UniformSetting]) -> list[UniformSetting]:
    """Order a grid so that every beginning of it represents the whole grid as well as possible.

    Each next setting is the one that most reduces the mean distance from a setting of the grid to
    the nearest chosen one, in first steps of the refinement. This greedy choice gains at least 63 %
    of the best choice of as many settings (Nemhauser, Wolsey and Fisher, 1978).
    """
    steps = np.array([(log_tau_of(one.alpha), one.recent_share, one.sinks) for one in grid])
    steps = steps / FIRST_STEPS
    distance = np.abs(steps[:, None] - steps[None]).sum(axis=-1)
    nearest = np.full(len(grid), np.inf)
    order: list[int] = []
    while len(order) < len(grid):
        means = np.minimum(distance, nearest).mean(axis=-1)
        means[order] = np.inf
        order.append(int(means.argmin()))
        nearest = np.minimum(nearest, distance[order[-1]])
    return [grid[index] for index in order]


def _refine(trials: Trials, best: TrialResult) -> tuple[UniformSetting, TrialResult]:
    measured = {best.setting}
    scale = 1.0
    number = 0
    while trials.trials_left > 0 and FIRST_STEPS[0] * scale >= MIN_STEP:
        around = (trials.spec.uniform(one) for one in _neighbours(_uniform_of(best), scale))
        settings = [
            one for one in dict.fromkeys(around) if one not in measured and trials.feasible(one)
        ]
        results = trials.measure(f"step/{number}", settings)
        measured.update(settings)
        number += 1
        cheapest = min(results, key=lambda one: one.mean, default=best)
        if cheapest.mean < best.mean:
            best = cheapest
        else:
            scale /= 2
    return _uniform_of(best), best


def _uniform_of(results: TrialResult) -> UniformSetting:
    setting = results.setting
    return UniformSetting(
        alpha=setting.alpha[0][0], recent_share=setting.recent_share, sinks=setting.sinks
    )


def _neighbours(setting: UniformSetting, scale: float) -> Iterator[UniformSetting]:
    """One step in each direction; `scale` is the share of the first steps, 1/2^n."""
    log_tau, share, sinks = (step * scale for step in FIRST_STEPS)
    for sign in (-1, 1):
        moved = min(max(log_tau_of(setting.alpha) + sign * log_tau, 0.0), LOG_TAU_MAX)
        yield setting.model_copy(update={"alpha": alpha_of(moved)})
        recent = min(max(setting.recent_share + sign * share, 0.0), 1.0)
        yield setting.model_copy(update={"recent_share": round(recent, 6)})
        if sinks >= 1:
            yield setting.model_copy(update={"sinks": max(setting.sinks + sign * round(sinks), 0)})
