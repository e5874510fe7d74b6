"""The scale of forgetting, and settings as points of a study and as policies."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2sf.schema import UniformSetting
from tuner.search.space import LOG_TAU_MAX, FitSpec, Setting, alpha_of, log_tau_of

SPEC = FitSpec(num_layers=3, num_kv_heads=2, budget=None, budget_ratio=0.2, prefill_chunk=7)
BASE = SPEC.uniform(UniformSetting(alpha=0.9, recent_share=0.25, sinks=4))


@given(st.floats(0, LOG_TAU_MAX - 0.01))
def test_alpha_rises_with_tau_and_comes_back_from_it(log_tau: float) -> None:
    alpha = alpha_of(log_tau)
    assert 0 <= alpha <= 1
    # alpha is kept to six digits, which near 1 is coarse in tau.
    assert abs(alpha_of(log_tau_of(alpha)) - alpha) < 2e-6
    assert alpha_of(log_tau + 0.5) > alpha or alpha == 1


def test_exactly_0_and_exactly_1_are_on_the_scale() -> None:
    assert [alpha_of(0.0), alpha_of(LOG_TAU_MAX)] == [0.0, 1.0]
    assert [log_tau_of(0.0), log_tau_of(1.0)] == [0.0, LOG_TAU_MAX]
    assert alpha_of(math.log(10)) == 0.9


def test_a_uniform_setting_is_one_alpha_and_equal_slots() -> None:
    assert Setting(((0.9, 0.9),) * 3, ((1.0, 1.0),) * 3, 0.25, 4) == BASE
    policy = SPEC.policy(BASE)
    assert (policy.budget_ratio, policy.budget, policy.prefill_chunk) == (0.2, None, 7)
    assert (policy.recent_share, policy.recent, policy.sinks) == (0.25, None, 4)
    assert (policy.alpha, policy.head_share) == (BASE.alpha, BASE.head_share)


def test_a_layer_and_a_head_are_changed_alone() -> None:
    assert BASE.with_layer(1, 0.5).alpha == ((0.9, 0.9), (0.5, 0.5), (0.9, 0.9))
    assert BASE.with_head(2, 1, 0.5).alpha == ((0.9, 0.9), (0.9, 0.9), (0.9, 0.5))
    assert BASE.with_head(2, 0, 0.5).alpha == ((0.9, 0.9), (0.9, 0.9), (0.5, 0.9))


@given(st.integers(0, 2), st.floats(0.2, 5), st.integers(0, 2), st.floats(0.2, 5))
def test_the_total_of_slots_stays_the_same(
    first: int, much: float, second: int, more: float
) -> None:
    shares = BASE.with_layer_slots((first,), much).with_layer_slots((second,), more).head_share
    assert sum(map(sum, shares)) == pytest.approx(6, abs=4e-4)
    assert all(share > 0 for row in shares for share in row)


def test_a_layer_gets_the_given_multiple_of_the_slots_of_the_others() -> None:
    first, second, third = BASE.with_layer_slots((1,), 2.0).head_share
    assert (first, second) == (third, pytest.approx((2 * first[0],) * 2, rel=1e-3))


def test_a_setting_stays_the_same_in_the_json_of_a_study() -> None:
    setting = BASE.with_head(0, 1, 0.995).with_layer_slots((2,), 2.0)
    assert Setting.of(json.loads(json.dumps(setting.point()))) == setting
