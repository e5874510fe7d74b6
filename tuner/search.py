"""What is searched, and how the next thing to try is chosen.

Owns the scale of forgetting (log tau, with exact 0 and exact 1 as members), the grid of uniform
settings with its successive halving, and the sampler that climbs from the best uniform setting to a
table. Knows nothing of where trials are stored, nor of the model: costs come from a callable.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from a2sf.schema import TablePolicy
from tuner.objective import Cost

LOG_TAU_MAX = math.log(2000)
"""Beyond 2,000 tokens a factor cannot be told from 1 on sequences of the lengths fitted here."""

Alphas = tuple[tuple[float, ...], ...]
"""[num_layers][num_kv_heads]"""


def alpha_of(log_tau: float) -> float:
    """Forgetting factor `1 - 1/tau`: exactly 0 at or below log tau 0, exactly 1 at the maximum."""
    if log_tau >= LOG_TAU_MAX:
        return 1.0
    # Six digits, so that what a file shows is what was measured.
    return round(-math.expm1(-max(log_tau, 0.0)), 6)


def log_tau_of(alpha: float) -> float:
    """The inverse of `alpha_of`, within [0, LOG_TAU_MAX]."""
    return LOG_TAU_MAX if alpha >= 1.0 else min(-math.log1p(-alpha), LOG_TAU_MAX)


@dataclass(frozen=True)
class Frame:
    """What every candidate of one search has in common."""

    num_layers: int
    num_kv_heads: int
    budget: int | None
    budget_ratio: float | None
    prefill_chunk: int

    def table(self, alpha: Alphas, *, recent_share: float, sinks: int) -> TablePolicy:
        """Complete a table of alphas to a policy."""
        return TablePolicy(
            alpha=alpha,
            layer_share=(1.0,) * self.num_layers,
            budget=self.budget,
            budget_ratio=self.budget_ratio,
            recent_share=recent_share,
            sinks=sinks,
            prefill_chunk=self.prefill_chunk,
        )

    def uniform(self, setting: "Uniform") -> TablePolicy:
        """One alpha everywhere."""
        alpha = ((setting.alpha,) * self.num_kv_heads,) * self.num_layers
        return self.table(alpha, recent_share=setting.recent_share, sinks=setting.sinks)


@dataclass(frozen=True)
class Uniform:
    """One alpha for all layers and heads, with what is protected from eviction."""

    alpha: float
    recent_share: float
    sinks: int


GRIDS: tuple[tuple[Uniform, ...], ...] = tuple(
    tuple(Uniform(float(a), share, s) for a, share, s in product(alphas, shares, sinks))
    for alphas, shares, sinks in (
        ((0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1), (0, 0.125, 0.25, 0.5), (0, 4)),
        ((0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1), (0, 0.125, 0.25, 0.5), (4,)),
        ((0, 0.7, 0.9, 0.99), (0.125, 0.5), (4,)),
    )
)
"""Finest first: 88, 32 and 8 settings."""


@dataclass(frozen=True)
class Rung:
    """One round of halving: `settings` survivors measured on the first `examples` examples."""

    settings: int
    examples: int


def ladder(examples: int, trials: int) -> tuple[tuple[Uniform, ...], tuple[Rung, ...]]:
    """Choose the grid and its rounds so that uniform settings get about the tables' effort.

    The tables will cost `trials` passes over all `examples`; the first round takes the finest grid
    that costs no more than that. Uniform settings thus get somewhat more than tables do, as long
    as tables get fewer than about forty trials.
    """
    first, second = max(2, examples // 4), max(2, examples // 2)
    effort = examples * max(trials, 8)
    grid = next((g for g in GRIDS if len(g) * first <= effort), GRIDS[-1])
    middle = max(len(grid) // 5, 3)
    last = min(max(trials // 6, 3), middle)
    return grid, (Rung(len(grid), first), Rung(middle, second), Rung(last, examples))


Measure = Callable[[Sequence[Uniform], int], Iterable[Cost]]
"""Costs of settings on the first so many examples, in order."""


def best_uniform(
    grid: Sequence[Uniform], rungs: Sequence[Rung], measure: Measure
) -> tuple[Uniform, Cost]:
    """Find the cheapest uniform setting: successive halving, then a step between grid points.

    The step tries the middles, in log tau, between the winner's alpha and its neighbours, so that
    a table's freedom to leave the grid is no advantage of its own.
    """
    alive: list[tuple[Uniform, Cost]] = []
    settings = list(grid)
    for rung in rungs:
        settings = settings[: rung.settings]
        costs = measure(settings, rung.examples)
        alive = sorted(zip(settings, costs, strict=True), key=lambda pair: pair[1].mean)
        settings = [setting for setting, _ in alive]
    winner = settings[0]
    between = [
        Uniform(alpha, winner.recent_share, winner.sinks)
        for alpha in _middles(winner.alpha, sorted({setting.alpha for setting in grid}))
    ]
    alive += zip(between, measure(between, rungs[-1].examples), strict=True)
    return min(alive, key=lambda pair: pair[1].mean)


def _middles(alpha: float, ladder_of_alphas: Sequence[float]) -> list[float]:
    place = ladder_of_alphas.index(alpha)
    neighbours = [*ladder_of_alphas[max(place - 1, 0) : place], *ladder_of_alphas[place + 1 :][:1]]
    return [alpha_of((log_tau_of(alpha) + log_tau_of(other)) / 2) for other in neighbours]


def space(num_layers: int, num_kv_heads: int) -> dict[str, BaseDistribution]:
    """One log tau for every layer and head."""
    return {
        f"log_tau.{layer}.{head}": FloatDistribution(0.0, LOG_TAU_MAX)
        for layer in range(num_layers)
        for head in range(num_kv_heads)
    }


def params_of(alpha: Alphas) -> dict[str, float]:
    """A table as the parameters of a trial."""
    return {
        f"log_tau.{layer}.{head}": log_tau_of(value)
        for layer, row in enumerate(alpha)
        for head, value in enumerate(row)
    }


def alphas_of(params: dict[str, Any], num_layers: int, num_kv_heads: int) -> Alphas:
    """The table that a trial's parameters stand for."""
    return tuple(
        tuple(alpha_of(params[f"log_tau.{layer}.{head}"]) for head in range(num_kv_heads))
        for layer in range(num_layers)
    )


def moves(num_layers: int, num_kv_heads: int, rng: Random) -> list[tuple[list[str], int]]:
    """Every block of parameters with both directions: large blocks first, shuffled within a size.

    Blocks are runs of half the layers, a quarter, and so on to single layers; then single heads.
    """
    layers = [
        [f"log_tau.{layer}.{head}" for head in range(num_kv_heads)] for layer in range(num_layers)
    ]
    planned: list[tuple[list[str], int]] = []
    size = num_layers
    while size > 1:
        size = -(-size // 2)
        runs = (layers[first : first + size] for first in range(0, num_layers, size))
        planned += _both_ways([[name for layer in run for name in layer] for run in runs], rng)
    if num_layers == 1 or num_kv_heads > 1:
        planned += _both_ways([[name] for layer in layers for name in layer], rng)
    return planned


def _both_ways(blocks: list[list[str]], rng: Random) -> list[tuple[list[str], int]]:
    both = [(block, direction) for block in blocks for direction in (-1, 1)]
    rng.shuffle(both)
    return both


class Climb(BaseSampler):
    """Move one block of the best table so far: half of the layers, ever fewer, one, one head.

    Each trial takes the best finished one and shifts the log tau of a block by .5 to 2.5. Every
    block is tried up and down, in random order within its size, the large ones first; after the
    heads it starts over. With tens of trials and tens of factors this gains where a model of the
    whole space has nothing to go on yet. A move depends on the study, the seed and the trial's
    number alone, so a resumed study goes on as it would have and workers never draw the same move.
    """

    name = "climb"

    def __init__(self, num_layers: int, num_kv_heads: int, seed: int) -> None:
        self._space = space(num_layers, num_kv_heads)
        self._seed = seed
        self._moves = moves(num_layers, num_kv_heads, Random(seed))
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters are drawn together."""
        return self._space

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return the best trial's parameters with one block moved."""
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not finished:
            return {}
        best = min(finished, key=lambda t: (t.value, t.number))
        rng = Random(f"{self._seed}/{trial.number}")
        block, direction = self._moves[trial.number % len(self._moves)]
        step = direction * rng.uniform(0.5, 2.5)
        params = dict(best.params)
        # At an end of the scale the only way is back.
        if all(params[name] == (0.0 if step < 0 else LOG_TAU_MAX) for name in block):
            step = -step
        for name in block:
            params[name] = min(max(params[name] + step, 0.0), LOG_TAU_MAX)
        return params

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw at random where there is no finished trial to climb from."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)
