"""The curvature: it foretells what a head alone costs; each head and row stands for itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from a2sf.model.loader import LoadedModel, load_model
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import EffectivePolicy
from a2sf.schema import UniformSetting
from tuner.data import packing
from tuner.data.datasets import load
from tuner.evaluation.divergence import divergence, full_cache
from tuner.evaluation.objective import effective
from tuner.search import curvature
from tuner.search.space import FitSpec

SETTING = UniformSetting(alpha=0.9, recent_share=0.25, sinks=2)


def spec(ratio: float, chunk: int = 0) -> FitSpec:
    return FitSpec(3, 2, budget=None, budget_ratio=ratio, prefill_chunk=chunk)


@pytest.fixture(scope="module")
def examples(tiny_model: LoadedModel, small_data: Path) -> list[Example]:
    part = load("sums", small_data).calibration
    return packing.examples(tiny_model, part, count=4, length=96, seed=0)


def alone(policy: EffectivePolicy, layer: int, head: int, length: int) -> EffectivePolicy:
    """The policy in one head; every other keeps all."""

    def only(rows: tuple[tuple[int, ...], ...], other: int) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(x if (i, j) == (layer, head) else other for j, x in enumerate(row))
            for i, row in enumerate(rows)
        )

    return policy.model_copy(
        update={
            "head_budgets": only(policy.head_budgets, length),
            "head_recents": only(policy.head_recents, 0),
        }
    )


def test_the_estimate_predicts_the_cost_of_each_head_alone(
    tiny_model_64: LoadedModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So many draws that the estimate's own error is a few hundredths.
    monkeypatch.setattr(curvature, "SAMPLES", 400)
    at = spec(0.5)
    policy = at.policy(at.uniform(SETTING))
    found = (
        curvature.effects(tiny_model_64, examples, [policy]).square().mean(dim=(0, 1))[..., 0] / 2
    )
    true = torch.zeros(3, 2, dtype=torch.float64)
    full = full_cache(tiny_model_64, examples)
    for layer in range(3):
        for head in range(2):
            policies = [
                alone(effective(policy, tiny_model_64, n), layer, head, n)
                for n in (len(example.token_ids) for example in examples)
            ]
            predicted = teacher_forcing.predict(tiny_model_64, examples, policies)
            kls = [divergence(*row)[0] for row in zip(examples, predicted, full, strict=True)]
            true[layer, head] = float(np.mean(kls))
    assert true.max() > 1.5 * true.min()
    np.testing.assert_allclose(found, true, rtol=0.25)
    assert spearmanr(found.flatten(), true.flatten()).statistic > 0.8


def test_a_budget_of_the_whole_length_changes_no_output(
    tiny_model_64: LoadedModel, examples: list[Example]
) -> None:
    at = FitSpec(3, 2, budget=200, budget_ratio=None, prefill_chunk=0)
    found = curvature.effects(tiny_model_64, examples[:1], [at.policy(at.uniform(SETTING))])
    assert found.abs().max() < 1e-9


@pytest.mark.parametrize("chunk", [0, 16])
def test_rows_and_policies_stand_for_themselves(
    tiny_model_64: LoadedModel, examples: list[Example], chunk: int
) -> None:
    frames = [spec(ratio, chunk) for ratio in (0.2, 0.5)]
    policies = [at.policy(at.uniform(SETTING)) for at in frames]
    short = Example(
        token_ids=examples[0].token_ids[:40],
        prompt_tokens=8,
        counted=tuple(range(20, 39)),
    )
    rows = [short, examples[1]]
    together = curvature.effects(tiny_model_64, rows, policies)
    assert together.shape == (2, curvature.SAMPLES, 3, 2, 2)
    for number, row in enumerate(rows):
        for place, policy in enumerate(policies):
            single = curvature.effects(tiny_model_64, [row], [policy])
            torch.testing.assert_close(single[0, ..., 0], together[number, ..., place])


def test_the_reported_work_is_the_work_done(
    tiny_model_64: LoadedModel, examples: list[Example]
) -> None:
    at = spec(0.3)
    ticks: list[int] = []
    curvature.effects(
        tiny_model_64, examples[:1], [at.policy(at.uniform(SETTING))], lambda: ticks.append(1)
    )
    assert len(ticks) == curvature.ticks(tiny_model_64)


def test_heads_of_one_layer_do_not_influence_each_other(
    tiny_model_64: LoadedModel, examples: list[Example]
) -> None:
    at = spec(0.3)
    setting = at.uniform(SETTING)
    both = at.policy(setting)
    one = at.policy(setting.with_head(1, 0, 0.0))
    found = curvature.effects(tiny_model_64, examples, [both, one])
    changed = (found[..., 0] - found[..., 1]).abs().amax(dim=(0, 1)) > 1e-12
    assert changed.tolist() == [[False, False], [True, False], [False, False]]


def test_a_model_in_half_precision_foretells_the_same(
    tiny_model_64: LoadedModel, tiny_model_dir: Path, examples: list[Example]
) -> None:
    half = load_model(str(tiny_model_dir), device="cpu", dtype="bfloat16")
    policies = [spec(0.3).policy(spec(0.3).uniform(SETTING))]
    one, other = (
        curvature.effects(model, examples, policies).square().mean(dim=(0, 1))
        for model in (half, tiny_model_64)
    )
    # Other words are drawn from figures that are rounded, and few of them.
    np.testing.assert_allclose(one.log(), other.log(), atol=1.0)
