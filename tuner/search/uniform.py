"""Finds the best uniform setting: one alpha for all heads and equal slots in all layers.

Owns the grid and its order, its successive halving, and the refinement around the best point. Knows
nothing of tables. This baseline must be as strong as its three numbers allow, because tables are
judged by it.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from a2sf.schema import UniformSetting
from tuner.search.space import LOG_TAU_MAX, alpha_of, log_tau_of
from tuner.search.trials import Trials, Tried

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

LEAST_STEP = 0.02
"""Smallest step of log tau: a factor of 1.02 in the length of memory."""


SHARE = 0.4
"""Largest share of the search time."""


def best_uniform(trials: Trials, most: int) -> tuple[UniformSetting, Tried]:
    """Find the best uniform setting on all examples, with at most `most` trials, at least one.

    The grid is halved on growing shares of the examples. Then a pattern search (Hooke and Jeeves,
    1961) steps from the winner in alpha, recent share and sinks, with smaller and smaller steps,
    until trials or time end or the steps are below the minimum. If trials or time are short, the
    grid is coarser.
    """
    grid = coarse_to_fine(GRID)
    most = max(most, 1)
    with trials.stage("uniform", most, SHARE):
        settings = [trials.frame.uniform(one) for one in grid]
        best = trials.halve("grid", settings, most, least=1)[0]
        taken = trials.accounts["uniform"].trials
        whole = sum(kept for kept, _ in trials.rungs(len(grid)))
        if taken < whole:
            trials.notes.append(
                f"The bar is the best of {taken} uniform trials, and the whole grid takes {whole}: "
                "more --trials or --minutes may raise it."
            )
        return _refined(trials, best)


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


def _refined(trials: Trials, best: Tried) -> tuple[UniformSetting, Tried]:
    known = {best.setting}
    scale = 1.0
    number = 0
    while trials.left > 0 and FIRST_STEPS[0] * scale >= LEAST_STEP:
        around = (trials.frame.uniform(one) for one in _around(_uniform(best), scale))
        settings = [
            one for one in dict.fromkeys(around) if one not in known and trials.feasible(one)
        ]
        tried = trials.measure(f"step/{number}", settings)
        known.update(settings)
        number += 1
        cheapest = min(tried, key=lambda one: one.mean, default=best)
        if cheapest.mean < best.mean:
            best = cheapest
        else:
            scale /= 2
    return _uniform(best), best


def _uniform(tried: Tried) -> UniformSetting:
    setting = tried.setting
    return UniformSetting(
        alpha=setting.alpha[0][0], recent_share=setting.recent_share, sinks=setting.sinks
    )


def _around(setting: UniformSetting, scale: float) -> Iterator[UniformSetting]:
    """One step in each direction; `scale` is the share of the first steps, 1/2^n."""
    log_tau, share, sinks = (step * scale for step in FIRST_STEPS)
    for sign in (-1, 1):
        moved = min(max(log_tau_of(setting.alpha) + sign * log_tau, 0.0), LOG_TAU_MAX)
        yield setting.model_copy(update={"alpha": alpha_of(moved)})
        recent = min(max(setting.recent_share + sign * share, 0.0), 1.0)
        yield setting.model_copy(update={"recent_share": round(recent, 6)})
        if sinks >= 1:
            yield setting.model_copy(update={"sinks": max(setting.sinks + sign * round(sinks), 0)})
