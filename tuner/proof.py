"""What a search came to, on examples that it never saw.

Owns the baselines that a table is compared with, the paired comparisons and the verdict. Knows
nothing of how the table was found.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from a2sf.policy import CachePolicy
from a2sf.schema import Evidence, Stage, TablePolicy, UniformSetting
from tuner import objective, statistics
from tuner.objective import Candidate, Cost, Objective
from tuner.search import Frame
from tuner.trials import Account, Tried

COMPARED_PRESETS = ("h2o", "window", "tova_per_head", "random")


def baselines(frame: Frame, uniform: UniformSetting, seed: int) -> dict[str, Candidate]:
    """The known methods that the table is compared with, at its budget.

    The presets protect what they always protect; random protects what the best uniform setting
    does, so that it shows what the score adds to the protection.
    """
    base = CachePolicy(
        budget=frame.budget, budget_ratio=frame.budget_ratio, prefill_chunk=frame.prefill_chunk
    )
    presets = {name: base.model_copy(update={"preset": name}) for name in COMPARED_PRESETS}
    protected = {"recent_share": uniform.recent_share, "sinks": uniform.sinks}
    presets["random"] = presets["random"].model_copy(update={**protected, "random_seed": seed})
    return dict(presets)


def judge(
    costs: dict[str, Cost], uniform: UniformSetting, dataset: str, split: str, seed: int
) -> Evidence:
    """Turn held-out costs (`table`, `uniform` and further baselines) into figures and a verdict.

    The table was chosen on other examples, so its own figure is not the best of many. It is
    compared with several baselines, though: better means that the whole paired interval of table
    minus uniform lies below 0, and that its p-value stays small once all of them are paid for.
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
        uniform=uniform,
        verdict="better" if sure else "no_better_than_uniform",
    )


def prove(
    held_out: Objective, candidates: Mapping[str, Candidate], stages: Mapping[str, TablePolicy]
) -> dict[str, Cost]:
    """Measure the candidates and, as `stage NAME`, what the stages came to; each policy once."""
    named = {**candidates, **{f"stage {name}": policy for name, policy in stages.items()}}
    different = list(dict.fromkeys(named.values()))
    costs = held_out.costs(different)
    bar = tqdm(costs, total=len(different), desc="held out", unit="policy", leave=False)
    known = dict(zip(different, bar, strict=True))
    return {name: known[policy] for name, policy in named.items()}


def stage(
    name: str,
    account: Account,
    best: Tried,
    kl: NDArray[np.float64],
    uniform: NDArray[np.float64],
    seed: int,
) -> Stage:
    """What a stage took, and what its best setting is worth.

    `kl` is what that setting costs by held-out example, and `uniform` the best uniform setting.
    """
    return Stage(
        name=name,
        trials=account.trials,
        evaluations=round(account.evaluations, 2),
        seconds=round(account.seconds, 1),
        calibration=best.mean,
        held_out=statistics.estimate(kl, seed=seed),
        paired=statistics.difference(kl, uniform, seed=seed),
    )
