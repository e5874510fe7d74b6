"""The cost: zero where nothing is evicted, and by the written-out definition elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tuner.evaluation.objective
from a2sf.errors import NonFinite
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy
from a2sf.schema import TablePolicy
from tuner.data import packing
from tuner.data.datasets import load
from tuner.evaluation.divergence import divergence, full_cache
from tuner.evaluation.objective import Candidate, Objective, effective

ALPHAS = ((0.0, 0.5), (0.9, 1.0), (0.3, 0.95))


def table(**overrides: object) -> TablePolicy:
    values: dict[str, object] = {
        "alpha": ALPHAS,
        "head_share": ((1.0, 1.0),) * 3,
        "budget_ratio": 0.2,
        "recent_share": 0.25,
        "sinks": 2,
        "prefill_chunk": 0,
    }
    return TablePolicy.model_validate({**values, **overrides}, strict=False)


@pytest.fixture(scope="module")
def examples(tiny_model: LoadedModel, small_data: Path) -> list[Example]:
    part = load("sums", small_data).calibration
    return packing.examples(tiny_model, part, count=5, length=128, seed=0)


@pytest.fixture(scope="module")
def objective(tiny_model: LoadedModel, examples: list[Example]) -> Objective:
    return Objective(tiny_model, examples, label="test")


@pytest.mark.parametrize(
    "policy", [table(budget=128, budget_ratio=None), CachePolicy(preset="full")]
)
def test_a_cache_without_eviction_costs_nothing(objective: Objective, policy: Candidate) -> None:
    cost = objective.cost(policy)
    assert np.abs(cost.kl).max() < 1e-6
    np.testing.assert_allclose(cost.nll, objective.full_nll, atol=1e-5)


def test_the_cost_is_the_written_out_divergence_in_nats(
    tiny_model: LoadedModel, examples: list[Example], objective: Objective
) -> None:
    example = examples[1]
    policy = effective(table(), tiny_model, len(example.token_ids))
    (full,) = teacher_forcing.predict(tiny_model, [example], None)
    (evicted,) = teacher_forcing.predict(tiny_model, [example], [policy])
    p, q = (torch.softmax(x.double(), dim=-1).numpy() for x in (full.logits, evicted.logits))
    kl, nll = [], []
    for row, position in enumerate(example.counted):
        kl.append(sum(p[row] * np.log(p[row] / q[row])))
        nll.append(-np.log(q[row, example.token_ids[position + 1]]))
    cost = objective.cost(table(), range(1, 2))
    assert np.mean(kl) > 0.01
    assert cost.kl == pytest.approx([np.mean(kl)], rel=1e-4)
    assert cost.nll == pytest.approx([np.mean(nll)], rel=1e-4)


def test_candidates_cost_the_same_side_by_side_as_alone(objective: Objective) -> None:
    # Three fill one pass of 32 rows twice over; the last rides alone.
    candidates: list[Candidate] = [table(sinks=sinks) for sinks in range(7)]
    candidates += [CachePolicy(preset=name, budget_ratio=0.2) for name in ("h2o", "random")]
    together = list(objective.costs(candidates, range(1, 5)))
    assert len(together) == len(candidates)
    for candidate, cost in zip(candidates, together, strict=True):
        alone = objective.cost(candidate, range(1, 5))
        np.testing.assert_allclose(cost.kl, alone.kl, rtol=1e-3, atol=1e-6)
    assert len({round(cost.mean, 6) for cost in together}) > 5


def test_a_candidate_is_resolved_by_the_rules_that_serving_uses(tiny_model: LoadedModel) -> None:
    policy = effective(table(), tiny_model, 100)
    assert policy.alpha == ALPHAS
    # floor(.2 x 100 + 1/2), and .25 of 20 - 2 - 1, floored.
    assert (policy.budget, policy.recent, policy.sinks) == (20, 4, 2)


@pytest.mark.parametrize("floor", [None, 64, 1000])
def test_a_minimum_budget_does_not_raise_the_ratio_of_a_candidate(
    tiny_model: LoadedModel, floor: int | None
) -> None:
    # A server would raise 20 slots to the table's floor.
    assert effective(table(min_budget=floor), tiny_model, 100).budget == 20
    requested_policy = CachePolicy(preset="h2o", budget_ratio=0.05)
    assert effective(requested_policy, tiny_model, 100).budget == 5


def test_a_fixed_budget_may_be_larger_than_an_example(tiny_model: LoadedModel) -> None:
    assert effective(table(budget=300, budget_ratio=None), tiny_model, 100).budget == 300


def test_starting_from_a_stored_layer_input_changes_no_cost(
    tiny_model: LoadedModel, examples: list[Example]
) -> None:
    kept = Objective(tiny_model, examples, label="kept")
    fresh = Objective(tiny_model, examples, label="fresh")
    base = table()
    above = table(alpha=(*ALPHAS[:2], (0.7, 0.1)))
    assert kept.anchor(base, 2) == pytest.approx(2 / 3)
    assert kept.anchor(base, 2) == 0, "known already"
    for policy in (base, above):
        assert kept.share_of_layers(policy) == pytest.approx(1 / 3)
        for part in (range(5), range(1, 3)):
            ours, plain = kept.cost(policy, part), fresh.cost(policy, part)
            np.testing.assert_allclose(ours.kl, plain.kl, atol=1e-6)
            np.testing.assert_allclose(ours.nll, plain.nll, atol=1e-5)
    # From an anchor below, only the layers between are run.
    assert kept.anchor(base, 1) == pytest.approx(1 / 3)
    assert kept.anchor(base, 2) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "other",
    [
        table(alpha=((0.1, 0.5), *ALPHAS[1:])),
        table(alpha=(ALPHAS[0], (0.9, 0.99), ALPHAS[2])),
        table(sinks=3),
        table(recent_share=0.5),
        table(head_share=((1.5, 1.0), (0.5, 0.4), (1.0, 1.6))),
        CachePolicy(preset="h2o", budget_ratio=0.2),
    ],
)
def test_a_policy_that_differs_below_the_anchor_is_run_from_the_first_layer(
    tiny_model: LoadedModel, examples: list[Example], other: Candidate
) -> None:
    kept = Objective(tiny_model, examples, label="kept")
    plain = kept.cost(other)
    kept.anchor(table(), 2)
    assert kept.share_of_layers(other) == 1
    np.testing.assert_array_equal(kept.cost(other).kl, plain.kl)


def run_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which every pass adds how many tokens of a row it runs."""
    widths: list[int] = []
    honest = LoadedModel.hidden_states

    def noting(self: LoadedModel, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        widths.append(ids.shape[1])
        return honest(self, ids, *rest)

    monkeypatch.setattr(LoadedModel, "hidden_states", noting)
    return widths


def test_prompts_are_run_once_for_all_candidates_and_change_no_cost(
    tiny_model: LoadedModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates: list[Candidate] = [table(), CachePolicy(preset="h2o", budget_ratio=0.2)]
    kept = Objective(tiny_model, examples, label="kept")
    widths = run_tokens(monkeypatch)
    ours = list(kept.costs(candidates, range(5)))
    whole = max(len(e.token_ids) for e in examples)
    prompt = max(e.prompt_tokens for e in examples)
    after = max(len(e.token_ids) - e.prompt_tokens for e in examples)
    assert after < whole
    assert widths == [prompt, after, whole]
    monkeypatch.setattr(tuner.evaluation.objective, "PROMPT_BYTES", 0)
    fresh = Objective(tiny_model, examples, label="fresh")
    for mine, plain in zip(ours, fresh.costs(candidates, range(5)), strict=True):
        np.testing.assert_allclose(mine.kl, plain.kl, atol=1e-6)
        np.testing.assert_allclose(mine.nll, plain.nll, atol=1e-5)
    assert widths[3:] == [whole, whole], "nothing is kept where there is no room"


def test_a_candidate_that_prunes_along_the_prompt_runs_it(
    tiny_model: LoadedModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Objective(tiny_model, examples, label="kept")
    exact = kept.cost(table())
    widths = run_tokens(monkeypatch)
    pruned = kept.cost(table(prefill_chunk=1))
    assert widths == [max(len(e.token_ids) for e in examples)]
    assert not np.allclose(pruned.kl, exact.kl)


@pytest.mark.parametrize("numbers", [1, 1000, 1 << 30])
def test_positions_cost_the_same_however_many_are_compared_at_once(
    tiny_model: LoadedModel,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    numbers: int,
) -> None:
    policy = effective(table(), tiny_model, len(examples[0].token_ids))
    full = full_cache(tiny_model, examples[:1])[0].clone()
    (found,) = teacher_forcing.predict(tiny_model, examples[:1], [policy])
    found = replace(found, logits=found.logits.clone())
    # What the model rules out in both costs nothing.
    full[:, 7] = found.logits[:, 7] = -torch.inf
    monkeypatch.setattr("tuner.evaluation.divergence._NUMBERS_PER_COMPARISON", numbers)
    kl, nll = divergence(examples[0], found, full)
    log_q = found.logits.double().log_softmax(dim=-1)
    terms = full.double().exp() * (full.double() - log_q)
    terms[:, 7] = 0.0
    assert kl == pytest.approx(float(terms.sum(dim=-1).mean()), rel=1e-5)
    targets = [examples[0].token_ids[t + 1] for t in examples[0].counted]
    assert nll == pytest.approx(-float(log_q[range(len(targets)), targets].mean()), rel=1e-6)
    # What it rules out in one alone costs without end.
    found.logits[3, 9] = -torch.inf
    with pytest.raises(NonFinite, match="KL to the full cache"):
        divergence(examples[0], found, full)
