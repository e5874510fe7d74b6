"""The bar: the best setting with one alpha for all heads and equal slots in all layers.

Owns the grid, its successive halving, and the refinement around the best point. Knows nothing of
tables: it is held to be as strong as its three numbers allow, because tables are judged by it.
"""

from collections.abc import Iterator
from itertools import pairwise, product

from a2sf.schema import UniformSetting
from tuner.search import LOG_TAU_MAX, alpha_of, log_tau_of
from tuner.trials import Trials, Tried

GRID = tuple(
    UniformSetting(alpha=float(alpha), recent_share=share, sinks=sinks)
    for alpha, share, sinks in product(
        (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1), (0.0, 0.125, 0.25, 0.5), (0, 4)
    )
)
"""88 settings."""

FIRST_STEPS = (0.35, 0.125, 4)
"""Of log tau (half of the way between two grid points, about), recent share and sinks."""

LEAST_STEP = 0.02
"""Of log tau: a factor of 1.02 in how long a token is remembered."""


def best_uniform(trials: Trials, refinement: int) -> tuple[UniformSetting, Tried]:
    """Find the best uniform setting on all examples.

    The grid is halved on growing shares of the examples; then a pattern search (Hooke and Jeeves,
    1961) steps from the winner in alpha, recent share and sinks, with ever smaller steps, until
    `refinement` trials are used or the steps have shrunk to nothing. The refinement may thus take
    as many trials as a table gets, and stops only where more would change nothing.
    """
    count = len(trials.objective.examples)
    settings = list(GRID)
    rungs = [(max(2, count // 4), len(GRID)), (max(2, count // 2), 18), (count, 6)]
    # With few examples a later rung would see no more of them than the one before.
    rungs = [rungs[0], *(after for before, after in pairwise(rungs) if after[0] > before[0])]
    with trials.stage("uniform", sum(kept for _, kept in rungs) + refinement):
        for examples, kept in rungs:
            settings = settings[:kept]
            tried = _measured(trials, f"grid/{examples}", settings, examples)
            order = sorted(range(len(settings)), key=lambda i: tried[i].mean)
            settings = [settings[i] for i in order]
        return _refined(trials, settings[0], tried[order[0]])


def _refined(trials: Trials, setting: UniformSetting, best: Tried) -> tuple[UniformSetting, Tried]:
    known = {setting}
    scale = 1.0
    number = 0
    while trials.left > 0 and FIRST_STEPS[0] * scale >= LEAST_STEP:
        settings = [
            one
            for one in dict.fromkeys(_around(setting, scale))
            if one not in known and trials.feasible(trials.frame.uniform(one))
        ]
        tried = _measured(trials, f"step/{number}", settings, None)
        known.update(settings)
        number += 1
        cheapest = min(range(len(tried)), key=lambda i: tried[i].mean, default=None)
        if cheapest is not None and tried[cheapest].mean < best.mean:
            best, setting = tried[cheapest], settings[cheapest]
        else:
            scale /= 2
    return setting, best


def _around(setting: UniformSetting, scale: float) -> Iterator[UniformSetting]:
    """One step in each direction: at a scale of 1/2^n, by so much of the first steps."""
    log_tau, share, sinks = (step * scale for step in FIRST_STEPS)
    for sign in (-1, 1):
        moved = min(max(log_tau_of(setting.alpha) + sign * log_tau, 0.0), LOG_TAU_MAX)
        yield setting.model_copy(update={"alpha": alpha_of(moved)})
        recent = min(max(setting.recent_share + sign * share, 0.0), 1.0)
        yield setting.model_copy(update={"recent_share": round(recent, 6)})
        if sinks >= 1:
            yield setting.model_copy(update={"sinks": max(setting.sinks + sign * round(sinks), 0)})


def _measured(
    trials: Trials, batch: str, settings: list[UniformSetting], examples: int | None
) -> list[Tried]:
    return trials.measure(batch, [trials.frame.uniform(s) for s in settings], examples=examples)
