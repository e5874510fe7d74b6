"""The sensitivity profile: what follows from it is measured, shared, and bounded by the time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.storages import InMemoryStorage

from a2sf.model.loader import LoadedModel
from a2sf.schema import TablePolicy, UniformSetting
from tests.tuner.planted import SPEC, Clock, Planted, table, trials_of
from tuner.data import packing
from tuner.data.datasets import load
from tuner.evaluation.objective import Objective
from tuner.search import curvature, profile_stages, sensitivity
from tuner.search.results import StageTotals, TrialResult
from tuner.search.sensitivity import ALPHAS, Profile
from tuner.search.space import FitSpec, Setting, alpha_of, log_tau_of
from tuner.search.trials import Trials
from tuner.study.ledger import Ledger

START = SPEC.uniform(UniformSetting(alpha=0.93, recent_share=0.25, sinks=4))
SIZES = np.array([[4.0, 1.0], [1.0, 0.25], [1.0, 1.0]])
WANTED = np.array([[0.8, 0.93], [0.93, 0.993], [1.0, 0.93]])
BUDGETS = (6, 12, 24, 40, 70)


def planted_costs(slots: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """[..., layers, heads] nats: a power of the slots, more where alpha is not the one wanted."""
    off = np.vectorize(log_tau_of)(alpha) - np.vectorize(log_tau_of)(WANTED)
    return SIZES / slots * (1 + 0.1 * off**2)


class ByHead(Planted):
    """Costs are the sum of planted costs of heads, on the scales of the frame."""

    def exact(self, policy: TablePolicy | Setting) -> float:
        slots = 40 * np.array(policy.head_share)
        return float(planted_costs(slots, np.array(policy.alpha)).sum())


PROFILE = Profile(
    length=100,
    budgets=BUDGETS,
    alphas=ALPHAS,
    costs=np.stack(
        [
            np.stack([planted_costs(np.array(b), np.full((3, 2), a)) for a in ALPHAS], axis=-1)
            for b in BUDGETS
        ],
        axis=2,
    ),
    noise=np.zeros((3, 2, len(BUDGETS), len(ALPHAS))),
    examples=16,
)


def started(planted: Planted, storage: Any = None) -> tuple[Trials, TrialResult]:
    trials = trials_of(planted, storage)
    with trials.stage("start", 1):
        (best,) = trials.measure("start", [START])
    return trials, best


def test_slots_and_then_alphas_follow_the_profile() -> None:
    planted = ByHead(START)
    trials, best = started(planted)
    with trials.stage("sensitivity", 20):
        dealt = profile_stages.split_by_profile(trials, best, PROFILE)
    shares = np.array(dealt.setting.head_share)
    # Where all fall with the first power, slots go with the roots of the sizes.
    off = 1 + 0.1 * (log_tau_of(0.93) - np.vectorize(log_tau_of)(WANTED)) ** 2
    roots = np.sqrt(SIZES * off)
    np.testing.assert_allclose(shares, roots / roots.mean(), rtol=0.06)
    assert dealt.setting.alpha == START.alpha
    with trials.stage("alphas", 20):
        chosen = profile_stages.alphas(trials, dealt, PROFILE)
    np.testing.assert_array_equal(chosen.setting.alpha, WANTED)
    assert chosen.mean < dealt.mean < best.mean


def test_the_baseline_by_layers_treats_all_heads_of_a_layer_equally() -> None:
    trials, best = started(ByHead(START))
    with trials.stage("per layer", profile_stages.MAX_PROPOSALS):
        slot_rule = profile_stages.search_per_layer(trials, best, PROFILE)
    assert slot_rule.mean < best.mean
    assert all(len(set(row)) == 1 for row in slot_rule.setting.head_share)
    assert all(len(set(row)) == 1 for row in slot_rule.setting.alpha)
    assert len(set(slot_rule.setting.head_share)) > 1
    with trials.stage("heads", 20):
        dealt = profile_stages.split_by_profile(trials, best, PROFILE)
        assert profile_stages.alphas(trials, dealt, PROFILE).mean < slot_rule.mean


def test_a_proposal_without_a_measured_gain_is_not_taken() -> None:
    planted = Planted(START)
    trials, best = started(planted)
    with trials.stage("sensitivity", 20):
        assert profile_stages.split_by_profile(trials, best, PROFILE) is best
    with trials.stage("alphas", 20):
        assert profile_stages.alphas(trials, best, PROFILE) is best
    assert len(planted.calls) > 3


def test_a_profile_of_noise_gives_equal_slots() -> None:
    noise = np.full_like(PROFILE.costs, 10.0)
    profile = replace(PROFILE, noise=noise)
    assert (profile.split(40, 8, 0) == 40).all()


def test_at_measured_budgets_the_curves_equal_the_measured_costs() -> None:
    slots = np.array([[6, 12], [24, 40], [70, 12]], dtype=float)
    found = PROFILE.at(slots)
    expected = np.stack([planted_costs(slots, np.full((3, 2), alpha)) for alpha in ALPHAS], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def real(
    model: LoadedModel, small_data: Path, storage: Any = None, minutes: float | None = None
) -> Trials:
    """The trials of a fit of the tiny model."""
    part = load("sums", small_data).calibration
    examples = packing.examples(model, part, count=4, length=96, seed=0)
    spec = FitSpec(3, 2, budget=None, budget_ratio=0.3, prefill_chunk=0)
    ledger = Ledger(storage or InMemoryStorage(), "x", {})
    return Trials(ledger, Objective(model, examples, label="test"), spec, minutes)


def looked(trials: Trials) -> Profile | None:
    with trials.stage("sensitivity", 20):
        return sensitivity.measure_profile(trials, trials.spec.uniform(SETTING))


SETTING = UniformSetting(alpha=0.9, recent_share=0.25, sinks=2)


def test_a_profile_is_stored_and_never_measured_twice(
    tiny_model: LoadedModel, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "MAX_ROWS", 1)
    storage = InMemoryStorage()
    first = looked(real(tiny_model, small_data, storage))

    def effects(*arguments: Any) -> torch.Tensor:
        raise AssertionError("known already")

    monkeypatch.setattr(curvature, "effects", effects)
    trials = real(tiny_model, small_data, storage)
    again = looked(trials)
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first.costs, again.costs)
    np.testing.assert_array_equal(first.noise, again.noise)
    assert first.examples == 4
    policies = len(first.budgets) * len(first.alphas)
    assert trials.stage_totals["sensitivity"].evaluations == pytest.approx(curvature.work(policies))


def test_the_number_of_rows_profiled_together_changes_nothing(
    tiny_model: LoadedModel, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = looked(real(tiny_model, small_data))
    monkeypatch.setattr(sensitivity, "MAX_ROWS", 1)
    alone = looked(real(tiny_model, small_data))
    assert together is not None
    assert alone is not None
    np.testing.assert_allclose(alone.costs, together.costs, rtol=1e-3, atol=1e-9)
    assert (together.costs >= 0).all()
    by_budget = together.costs.sum(axis=(0, 1))
    assert (by_budget[-1] < 0.01 * by_budget[0]).all()


def test_a_profile_of_fewer_examples_is_noted(
    tiny_model: LoadedModel, small_data: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(sensitivity, "MAX_ROWS", 1)
    monkeypatch.setattr("tuner.search.trials.time.perf_counter", lambda: clock.now)
    honest = curvature.effects

    def slow(*arguments: Any) -> torch.Tensor:
        clock.now += 10
        return honest(*arguments)

    monkeypatch.setattr(curvature, "effects", slow)
    trials = real(tiny_model, small_data, minutes=1)
    found = looked(trials)
    assert found is not None
    # Of 60 s a third is for the proof, and of the rest six tenths for the look.
    assert found.examples == 2
    assert any("uses 2 of 4 examples" in note for note in trials.notes)


def test_too_little_time_for_one_example_is_reported_once(
    tiny_model: LoadedModel, small_data: Path
) -> None:
    trials = real(tiny_model, small_data, minutes=2.5 / 60)
    with trials.stage("uniform", 1):
        trials.stage_totals["uniform"] = StageTotals(trials=1, evaluations=1.0, seconds=1.0)
    for stage in ("sensitivity", "alphas"):
        with trials.stage(stage, 20):
            assert trials.trials_left > 0
            assert sensitivity.measure_profile(trials, trials.spec.uniform(SETTING)) is None
    assert trials.notes == [
        "There was no time for the sensitivity profile: it needs more --minutes."
    ]


def test_without_trials_no_profile_is_measured(tiny_model: LoadedModel, small_data: Path) -> None:
    trials = real(tiny_model, small_data)
    with trials.stage("sensitivity", 0):
        found = sensitivity.measure_profile(trials, trials.spec.uniform(SETTING))
    assert found is None


def test_alphas_of_the_profile_are_on_the_scale_of_the_search() -> None:
    assert table((0.8, 0.93), (0.98, 0.993), (1.0, 1.0)).alpha
    assert all(alpha_of(log_tau_of(alpha)) == pytest.approx(alpha) for alpha in ALPHAS)
