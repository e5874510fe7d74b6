"""The verdict: a gain is found, chance is called chance at the stated rate, and who is compared."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from a2sf.model.loader import LoadedModel
from a2sf.schema import UniformSetting
from tuner.evaluation import statistics
from tuner.evaluation.objective import Cost, effective
from tuner.evaluation.slot_rules import FLOOR
from tuner.proof import baselines, judge
from tuner.search.space import FitSpec

SETTING = UniformSetting(alpha=0.9, recent_share=0.25, sinks=4)


def costs(table: np.ndarray, uniform: np.ndarray) -> dict[str, Cost]:
    return {"table": Cost(kl=table, nll=table), "uniform": Cost(kl=uniform, nll=uniform)}


def test_a_planted_gain_on_every_example_is_called_better() -> None:
    rng = np.random.default_rng(0)
    uniform = rng.exponential(size=32)
    evidence = judge(costs(uniform * 0.9, uniform), uniform, SETTING, "x", "validation", seed=0)
    assert evidence.verdict == "better"
    assert evidence.paired["uniform"].high < 0
    assert evidence.examples == 32
    assert evidence.table.mean == pytest.approx(0.9 * evidence.baselines["uniform"].mean)
    # Likelihoods are those of costs: the table's less the full cache's, pair by pair.
    assert evidence.lost_nll is not None
    assert evidence.lost_nll.mean == pytest.approx(-0.1 * uniform.mean())
    assert evidence.lost_nll.high < 0


def test_a_gain_that_may_be_chance_and_a_loss_are_no_better_than_uniform() -> None:
    rng = np.random.default_rng(0)
    uniform = rng.exponential(size=32)
    by_chance = uniform + rng.normal(loc=-0.001, scale=0.1, size=32)
    for table in (by_chance, uniform * 1.1, uniform):
        verdict = judge(costs(table, uniform), uniform, SETTING, "x", "validation", 0).verdict
        assert verdict == "no_better_than_uniform"


def verdicts(
    difference: Callable[[np.random.Generator], NDArray[np.float64]], runs: int = 300
) -> float:
    """The share of experiments, table minus uniform drawn anew in each, that are called better."""
    better = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        uniform = rng.exponential(size=32) + 1
        evidence = judge(
            costs(uniform + difference(rng), uniform), uniform, SETTING, "x", "validation", seed
        )
        better += evidence.verdict == "better"
    return better / runs


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that hundreds of experiments take seconds."""
    for name in ("estimate", "difference", "sign_flip_p"):
        honest = getattr(statistics, name)
        monkeypatch.setattr(
            statistics, name, lambda *a, f=honest, **k: f(*a, **{"resamples": 499, **k})
        )


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    "chance",
    [
        lambda rng: rng.normal(scale=0.1, size=32),
        lambda rng: 0.1 * (rng.exponential(size=32) - 1),  # a long tail of losses
        lambda rng: 0.1 * (1 - rng.exponential(size=32)),  # of gains
        lambda rng: np.zeros(32),
    ],
)
def test_chance_is_called_better_no_more_often_than_its_confidence_allows(
    chance: Callable[[np.random.Generator], NDArray[np.float64]],
) -> None:
    # One side of a 95 % interval is 2.5 %, and with 32 examples of a skewed kind somewhat more.
    assert verdicts(chance) <= 0.06


@pytest.mark.usefixtures("few_resamples")
def test_a_gain_of_a_standard_deviation_is_nearly_always_found() -> None:
    assert verdicts(lambda rng: rng.normal(loc=-0.1, scale=0.1, size=32), runs=100) >= 0.99


def test_adakv_is_not_a_baseline_if_prompts_are_read_token_by_token() -> None:
    names = baselines(FitSpec(3, 2, budget=20, budget_ratio=None, prefill_chunk=1), SETTING, seed=0)
    assert "pyramid" in names
    assert "adakv" not in names


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize(("budget", "ratio"), [(20, None), (None, 0.3)])
def test_all_baselines_have_the_tables_budget_and_prefill_law(
    tiny_model: LoadedModel, budget: int | None, ratio: float | None, chunk: int
) -> None:
    spec = FitSpec(3, 2, budget=budget, budget_ratio=ratio, prefill_chunk=chunk)
    compared = baselines(spec, SETTING, seed=7)
    compared["uniform"] = spec.policy(spec.uniform(SETTING))
    policies = {name: effective(policy, tiny_model, 100) for name, policy in compared.items()}
    assert {policy.budget for policy in policies.values()} == {budget or 30}
    assert {policy.prefill_chunk for policy in policies.values()} == {chunk}
    # Random protects what the table does, so that it shows what the score adds.
    own, random = policies["uniform"], policies["random"]
    assert (random.recent, random.sinks) == (own.recent, own.sinks)
    assert random.random_seed == 7
    assert (policies["adakv"].alpha[0][0], policies["adakv a2sf"].alpha) == (1.0, own.alpha)
    assert policies["adakv"].pooled_floor == policies["adakv a2sf"].pooled_floor == FLOOR
    plain, forgetting = policies["pyramid"], policies["pyramid a2sf"]
    assert plain.head_budgets == forgetting.head_budgets != own.head_budgets
    assert (plain.alpha[0][0], forgetting.alpha) == (1.0, own.alpha)
    assert plain.sinks == own.sinks
