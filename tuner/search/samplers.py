"""Searches whole tables with general optimisers: Optuna's TPE, and CMA-ES.

Owns the search spaces and the loop over proposals. It asks for a few settings at a time, so that
workers share them and a repeated search proposes the same settings. Knows nothing of the coordinate
stages, except that they leave a best setting as the start.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import cmaes
import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from tuner.search.moves import CoordinateSearch
from tuner.search.results import TrialResult
from tuner.search.space import LOG_TAU_MAX, Setting, alpha_of, log_tau_of, shares

BATCH_SIZE = 4
"""Settings that TPE proposes together, before it knows the cost of any of them."""

MAX_INFEASIBLE_ROUNDS = 25
"""Rounds in a row without a feasible setting, after which the search ends. In an infeasible setting
some layer has only protected slots."""

LOG2_SHARE = (-3.0, 3.0)
"""From an eighth of the budget to eight times as much, before all are scaled to the same total."""


@dataclass(frozen=True)
class Space:
    """A space of numbers; each point represents a setting."""

    ranges: Mapping[str, tuple[float, float]]
    start: Mapping[str, float]
    """The numbers of the best setting so far, or of the nearest point in the space."""
    setting: Callable[[Mapping[str, float]], Setting]
    clipped: tuple[str, ...] = ()
    """Numbers of the best setting that are outside their range, and the start used instead."""

    def __post_init__(self) -> None:
        """Raise ValueError for a start outside its range, which Optuna would accept."""
        for name, (low, high) in self.ranges.items():
            if not low <= self.start[name] <= high:
                raise ValueError(
                    f"{name} starts at {self.start[name]:g}; accepted: {low:g} to {high:g}"
                )


class Optimiser(Protocol):
    """Proposes points of a space, in rounds."""

    batch_size: int

    def ask(self) -> Mapping[str, float]:
        """Propose a point."""
        ...

    def tell(self, costs: Sequence[float | None]) -> None:
        """Take the costs of the last `at_once` points, in order; None if not measured."""
        ...


class Tpe:
    """Optuna's tree-structured Parzen estimator, all dimensions together."""

    batch_size = BATCH_SIZE

    def __init__(self, space: Space, cost: float | None, seed: int) -> None:
        """Begin with the space's start: with its `cost` if known, else as the first proposal."""
        self._distributions = {n: FloatDistribution(*ends) for n, ends in space.ranges.items()}
        self._study = optuna.create_study(
            sampler=TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=8)
        )
        if cost is None:
            self._study.enqueue_trial(dict(space.start))
        else:
            self._study.add_trial(
                create_trial(
                    params=dict(space.start), distributions=dict(self._distributions), value=cost
                )
            )
        self._proposals: list[optuna.Trial] = []

    def ask(self) -> Mapping[str, float]:
        """Propose a point."""
        self._proposals.append(self._study.ask(dict(self._distributions)))
        return self._proposals[-1].params

    def tell(self, costs: Sequence[float | None]) -> None:
        """Take the costs."""
        for trial, cost in zip(self._proposals, costs, strict=True):
            self._study.tell(trial, cost, state=TrialState.FAIL if cost is None else None)
        self._proposals.clear()


class Cma:
    """Evolution with an adapted covariance matrix (CMA-ES), every dimension scaled to [0, 1]."""

    def __init__(self, space: Space, seed: int) -> None:
        """Begin around the start of the space."""
        self._names = list(space.ranges)
        self._low, high = np.array(list(space.ranges.values())).T
        self._size = high - self._low
        start = np.array([space.start[name] for name in self._names])
        self._cma = cmaes.CMA(
            mean=(start - self._low) / self._size,
            sigma=0.15,
            bounds=np.array([[0.0, 1.0]] * len(self._names)),
            seed=seed,
        )
        self.batch_size = self._cma.population_size
        self._proposals: list[NDArray[np.float64]] = []

    def ask(self) -> Mapping[str, float]:
        """Propose a point."""
        self._proposals.append(self._cma.ask())
        values = self._low + self._size * self._proposals[-1]
        return dict(zip(self._names, values.tolist(), strict=True))

    def tell(self, costs: Sequence[float | None]) -> None:
        """Take the costs. Only their order matters; a point without a cost counts as the worst."""
        finite_costs = [np.inf if cost is None else cost for cost in costs]
        self._cma.tell(list(zip(self._proposals, finite_costs, strict=True)))
        self._proposals.clear()


def tpe(state: CoordinateSearch, seed: int) -> None:
    """Search the alpha of every head by TPE; everything else stays as in the best setting."""
    space = every_head(state.best.setting)
    _run_optimiser(state, "tpe", space, Tpe(space, _start_cost(space, state.best), seed))


def cma(state: CoordinateSearch, seed: int) -> None:
    """Search the alpha and the slots of every layer, and the protection, by CMA-ES."""
    space = by_layer(state.best.setting)
    _run_optimiser(state, "cma", space, Cma(space, seed))


def _start_cost(space: Space, best: TrialResult) -> float | None:
    """The cost of the space's start; None if it represents another setting than the best."""
    return best.mean if space.setting(space.start) == best.setting else None


def every_head(best: Setting) -> Space:
    """One log tau per head."""
    heads = {
        f"log_tau.{layer}.{head}": log_tau_of(alpha)
        for layer, row in enumerate(best.alpha)
        for head, alpha in enumerate(row)
    }

    def setting(numbers: Mapping[str, float]) -> Setting:
        alpha = tuple(
            tuple(alpha_of(numbers[f"log_tau.{layer}.{head}"]) for head in range(len(row)))
            for layer, row in enumerate(best.alpha)
        )
        return replace(best, alpha=alpha)

    return _space_from(dict.fromkeys(heads, (0.0, LOG_TAU_MAX)), heads, setting)


def by_layer(best: Setting) -> Space:
    """One log tau and one share per layer, and the protection; starts from the layers' means."""
    layers = range(len(best.alpha))
    taus = [float(np.mean([log_tau_of(alpha) for alpha in row])) for row in best.alpha]
    logs = [float(np.log2(np.mean(row))) for row in best.head_share]
    ranges = {f"log_tau.{layer}": (0.0, LOG_TAU_MAX) for layer in layers}
    start = {f"log_tau.{layer}": taus[layer] for layer in layers}
    ranges |= {f"log2_share.{layer}": LOG2_SHARE for layer in layers}
    start |= {f"log2_share.{layer}": logs[layer] for layer in layers}

    def setting(numbers: Mapping[str, float]) -> Setting:
        chosen = _with_layer_shares(best, [2 ** numbers[f"log2_share.{layer}"] for layer in layers])
        for layer in layers:
            chosen = chosen.with_layer(layer, alpha_of(numbers[f"log_tau.{layer}"]))
        return _with_protection(chosen, numbers)

    return _space_from({**ranges, **_PROTECTION}, {**start, **_protection_of(best)}, setting)


_PROTECTION = {"recent_share": (0.0, 1.0), "sinks": (0.0, 8.0)}


def _protection_of(best: Setting) -> dict[str, float]:
    return {"recent_share": best.recent_share, "sinks": float(best.sinks)}


def _space_from(
    ranges: Mapping[str, tuple[float, float]],
    start: Mapping[str, float],
    setting: Callable[[Mapping[str, float]], Setting],
) -> Space:
    """Make a space that starts at the best setting, or at the nearest point within the ranges."""
    within = {
        name: min(max(value, ranges[name][0]), ranges[name][1]) for name, value in start.items()
    }
    clipped = [f"{n} at {within[n]:g}, not {v:g}" for n, v in start.items() if within[n] != v]
    return Space(ranges, within, setting, tuple(clipped))


def _with_protection(setting: Setting, numbers: Mapping[str, float]) -> Setting:
    share, sinks = round(numbers["recent_share"], 4), round(numbers["sinks"])
    return replace(setting, recent_share=share, sinks=sinks)


def _with_layer_shares(best: Setting, weights: Sequence[float]) -> Setting:
    """Split slots by layer; within a layer the heads keep their proportions."""
    means = np.mean(best.head_share, axis=1, keepdims=True)
    weighted = np.asarray(best.head_share) / means * np.asarray(weights)[:, None]
    return replace(best, head_share=shares(weighted.tolist()))


def _run_optimiser(state: CoordinateSearch, name: str, space: Space, optimiser: Optimiser) -> None:
    """Measure the optimiser's proposals until the trials end, and report their costs to it."""
    if space.clipped:
        state.trials.notes.append(
            f"The stage {name} starts at the nearest setting within its ranges: "
            f"{', '.join(space.clipped)}."
        )
    number = 0
    infeasible_rounds = 0
    while state.trials.trials_left > 0 and infeasible_rounds < MAX_INFEASIBLE_ROUNDS:
        settings = [space.setting(optimiser.ask()) for _ in range(optimiser.batch_size)]
        feasible = list(dict.fromkeys(filter(state.trials.feasible, settings)))
        infeasible_rounds = 0 if feasible else infeasible_rounds + 1
        before = state.best
        results = state.trials.measure(f"{name}/{number}", feasible, best=before)
        costs = {one.setting: _expected_cost(one, before) for one in results}
        optimiser.tell([costs.get(setting) for setting in settings])
        # The cheapest setting is the best, as for Optuna; no significance is required.
        state.best = min([before, *results], key=lambda one: one.mean)
        number += 1


def _expected_cost(one: TrialResult, best: TrialResult) -> float:
    """The cost on all examples; if given up early, estimated by its difference from the best."""
    return best.mean + float((one.kl - best.kl[: len(one.kl)]).mean())
