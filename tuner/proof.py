"""Tests the result of a search on examples that the search never used.

Owns the baselines that a table is compared with, the paired comparisons and the verdict. Knows
nothing of how the table was found.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy
from a2sf.schema import Evidence, Stage, TablePolicy, UniformSetting
from tuner.data import packing
from tuner.evaluation import objective, statistics
from tuner.evaluation.objective import ROWS_PER_PASS, Candidate, Cost, Objective
from tuner.evaluation.slot_rules import AdaKV, Pyramid
from tuner.search.space import FitSpec
from tuner.search.stages import SearchResult
from tuner.search.trials import Trials
from tuner.settings import MIN_EXAMPLES, PER_LAYER, PROOF
from tuner.study.ledger import Ledger
from tuner.study.records import PointCost

BASELINE_PRESETS = ("h2o", "window", "tova_per_head", "random")

BASELINES = len(BASELINE_PRESETS) + 5
"""Includes PyramidKV's schedule and AdaKV's rule, each with two alphas, and the best setting by
layers."""


def max_rows(held_out: int, stages: int) -> int:
    """Largest number of rows of a proof: full cache, table, uniform, baselines and stages."""
    return held_out * (3 + BASELINES + stages)


@dataclass(frozen=True)
class Proof:
    """The costs of the policies of a proof, on the held-out examples that fitted into the time."""

    costs: dict[str, Cost]
    full_nll: NDArray[np.float64]
    """[examples] nats per token with the full cache."""


def candidates(spec: FitSpec, found: SearchResult, seed: int) -> dict[str, Candidate]:
    """The policies that the proof compares: `table`, `uniform`, and all other baselines."""
    policies: dict[str, Candidate] = {
        "table": spec.policy(found.best.setting),
        "uniform": spec.policy(spec.uniform(found.uniform)),
        **baselines(spec, found.uniform, seed),
    }
    if found.per_layer is not None:
        policies[PER_LAYER] = spec.policy(found.per_layer.setting)
    return policies


def baselines(spec: FitSpec, uniform: UniformSetting, seed: int) -> dict[str, Candidate]:
    """The known methods that the table is compared with, at its budget.

    The presets keep their usual protection. random has the protection of the best uniform setting,
    so that the difference shows the value of the score. PyramidKV's schedule and AdaKV's rule have
    that protection too: with accumulated attention as `pyramid` and `adakv`, and with the best
    uniform alpha as `pyramid a2sf` and `adakv a2sf`. AdaKV's rule is omitted if prompts are read
    token by token.
    """
    base = CachePolicy(
        budget=spec.budget, budget_ratio=spec.budget_ratio, prefill_chunk=spec.prefill_chunk
    )
    presets = {name: base.model_copy(update={"preset": name}) for name in BASELINE_PRESETS}
    protected = {"recent_share": uniform.recent_share, "sinks": uniform.sinks}
    presets["random"] = presets["random"].model_copy(update={**protected, "random_seed": seed})
    fitted = base.model_copy(update={**protected, "alpha": uniform.alpha})
    plain = fitted.model_copy(update={"alpha": 1.0})
    slot_rules: dict[str, Candidate] = {
        "pyramid": Pyramid(equal=plain),
        "pyramid a2sf": Pyramid(equal=fitted),
    }
    if spec.prefill_chunk != 1:
        slot_rules |= {"adakv": AdaKV(equal=plain), "adakv a2sf": AdaKV(equal=fitted)}
    return {**presets, **slot_rules}


def judge(
    costs: dict[str, Cost],
    full_nll: NDArray[np.float64],
    uniform: UniformSetting,
    dataset: str,
    split: str,
    seed: int,
) -> Evidence:
    """Turn held-out costs (`table`, `uniform` and further baselines) into figures and a verdict.

    `full_nll` [examples] is the cost of the true next token with the full cache, in nats per token.

    The table was chosen on other examples, so its figure is not biased by the choice. But it is
    compared with several baselines. So "better" requires that the whole paired interval of table
    minus uniform is below 0, and that its p-value remains small after the correction for all
    comparisons.
    """
    ours = costs["table"].kl
    others = {name: cost.kl for name, cost in costs.items() if name != "table"}
    paired = {name: statistics.difference(ours, kl, seed=seed) for name, kl in others.items()}
    p_values = statistics.sign_flip_p([ours - kl for kl in others.values()], seed=seed)
    p_holm = dict(zip(others, statistics.holm(p_values), strict=True))
    sure = paired["uniform"].high < 0 and p_holm["uniform"] < 1 - statistics.CONFIDENCE
    return Evidence(
        objective=objective.DESCRIPTION,
        dataset=dataset,
        split=split,
        examples=len(ours),
        confidence=statistics.CONFIDENCE,
        table=statistics.estimate(ours, seed=seed),
        baselines={name: statistics.estimate(kl, seed=seed) for name, kl in others.items()},
        paired=paired,
        p_holm=p_holm,
        lost_nll=statistics.difference(costs["table"].nll, full_nll, seed=seed),
        uniform=uniform,
        verdict="better" if sure else "no_better_than_uniform",
    )


def prove(
    ledger: Ledger,
    trials: Trials,
    model: LoadedModel,
    held_out: Sequence[Example],
    candidates: Mapping[str, Candidate],
    stages: Mapping[str, TablePolicy],
) -> Proof:
    """Measure the candidates and, as `stage NAME`, the stages' results; each policy once.

    Uses as many held-out examples, in order, as fit into the time that the search left. Raises
    InvalidArgument if these are fewer than MIN_EXAMPLES and not all.
    """
    named = {**candidates, **{f"stage {name}": policy for name, policy in stages.items()}}
    policies = list(dict.fromkeys(named.values()))
    by_policy: list[list[PointCost]] = [[] for _ in policies]
    full: list[float] = []
    spent = 0.0
    about = len(held_out) * (len(policies) + 1) * trials.seconds_per_row
    trials.progress.begin(PROOF, trials.seconds_spent, min(about, trials.seconds_left))
    while (first := len(full)) < len(held_out):
        end = min(first + ROWS_PER_PASS if first else MIN_EXAMPLES, len(held_out))
        if first:
            need = spent / first * (end - first)
        else:
            passes = math.ceil(end * len(policies) / ROWS_PER_PASS)
            need = (passes + 1) * trials.seconds_per_trial
        if need > trials.seconds_left - spent:
            if not first:
                # Rows of a pass may take as long together as one by one.
                alone = end * (len(policies) + 1) * trials.seconds_per_row
                raise _not_enough_time(trials, end, max(need, alone))
            break
        part = _HeldOut(model, held_out[first:end], policies, trials.progress.show)
        if not first:
            # The time of one pass shows whether there is time for the others.
            begun = ledger.measure(part.name, part.points, part.measure, max_points=part.batch_size)
            spent = math.fsum(one.seconds for one in begun)
            need = spent * (len(policies) - len(begun)) / len(begun)
            if need > max(trials.seconds_left - spent, 0.0):
                raise _not_enough_time(trials, end, spent + need)
        full += _measure(ledger, part, by_policy)
        spent = math.fsum(one.seconds for measured in by_policy for one in measured)
        left = spent / len(full) * (len(held_out) - len(full))
        trials.progress.show(
            f"{len(full)} of {len(held_out)} held-out examples",
            trials.seconds_spent + spent,
            min(left, trials.seconds_left - spent),
        )
    if len(full) < len(held_out):
        trials.limits.add("--minutes")
        trials.notes.append(
            f"The proof uses {len(full)} of {len(held_out)} held-out examples: more --minutes "
            "make its intervals narrower."
        )
    costs = {
        policy: Cost(
            kl=np.array([x for one in measured for x in one.kl]),
            nll=np.array([x for one in measured for x in one.nll]),
        )
        for policy, measured in zip(policies, by_policy, strict=True)
    }
    return Proof({name: costs[policy] for name, policy in named.items()}, np.array(full))


def _not_enough_time(trials: Trials, examples: int, need: float) -> InvalidArgument:
    # A third of the time is kept for the proof, minus the overrun of the last trial of the search.
    enough = max(3 * (need + trials.seconds_per_trial), trials.seconds_spent + need) / 60
    return InvalidArgument(
        "minutes",
        f"the search has taken {trials.seconds_spent:.0f} s, and the remaining time is too short "
        f"for a proof on {examples} held-out examples, about {need:.0f} s; all measurements are "
        f"kept: run the same command with --minutes {math.ceil(10 * enough) / 10:g} or more",
    )


class _HeldOut:
    """Some held-out examples, and the policies' costs on them; runs nothing until asked."""

    def __init__(
        self,
        model: LoadedModel,
        examples: Sequence[Example],
        policies: Sequence[Candidate],
        watch: Callable[[str], object],
    ) -> None:
        self.objective = Objective(model, examples, label="held-out", on_progress=watch)
        self.points: list[dict[str, Any]] = [
            {"kind": type(policy).__name__, **policy.model_dump(mode="json")} for policy in policies
        ]
        content = json.dumps([packing.digest(examples), self.points], sort_keys=True)
        self.name = f"proof {hashlib.sha256(content.encode()).hexdigest()[:12]}"
        self.batch_size = max(1, ROWS_PER_PASS // len(examples))
        self._policies = policies
        self._group = cache(self._costs)

    def measure(self, index: int, _: dict[str, Any]) -> PointCost:
        """Measure a policy, and store the costs of the policies that share its passes."""
        cost = self._group(index // self.batch_size)[index % self.batch_size]
        return PointCost(kl=cost.kl.tolist(), nll=cost.nll.tolist(), evaluations=1.0)

    def _costs(self, group: int) -> list[Cost]:
        first = group * self.batch_size
        return list(self.objective.costs(self._policies[first : first + self.batch_size]))


def _measure(ledger: Ledger, part: _HeldOut, by_policy: Sequence[list[PointCost]]) -> list[float]:
    """Add each policy's costs; return the negative log-likelihoods with the full cache."""
    measured = ledger.measure(part.name, part.points, part.measure)
    for known, one in zip(by_policy, measured, strict=True):
        known.append(one)
    key = f"{part.name}/full"
    if ledger.decided(key) is None:
        ledger.decide_once(key, part.objective.full_nll.tolist())
    full: list[float] = ledger.decided(key)
    return full


def stages(found: SearchResult, proved: Proof, seed: int) -> tuple[Stage, ...]:
    """Summarise the stages: the work of each, and the held-out value of its best setting.

    The search for the baseline `per layer` is among them, at its place, if it had a trial.
    """
    uniform = proved.costs["uniform"].kl
    summaries = []
    for name, totals in found.stage_totals.items():
        if name == PER_LAYER and found.per_layer is not None:
            best, kl = found.per_layer, proved.costs[PER_LAYER].kl
        elif name in found.bests:
            best, kl = found.bests[name], proved.costs[f"stage {name}"].kl
        else:
            # The search by layers had no trial.
            continue
        summaries.append(
            Stage(
                name=name,
                trials=totals.trials,
                evaluations=round(totals.evaluations, 2),
                seconds=round(totals.seconds, 3),
                calibration=best.mean,
                held_out=statistics.estimate(kl, seed=seed),
                paired=statistics.difference(kl, uniform, seed=seed),
            )
        )
    return tuple(summaries)
