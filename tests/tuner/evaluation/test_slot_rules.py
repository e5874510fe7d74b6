"""Rivals' rules: PyramidKV's schedule is the paper's, AdaKV's deals at the end of a prompt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from a2sf.cache.budgets import resolve
from a2sf.errors import InvalidArgument
from a2sf.model.loader import LoadedModel
from a2sf.policy import CachePolicy
from tuner.evaluation.objective import effective
from tuner.evaluation.slot_rules import FLOOR, AdaKV, Pyramid


def slots(pyramid: Pyramid, length: int, layers: int = 5, heads: int = 2) -> np.ndarray:
    """The slots of each layer, [layers]; all heads of one have as many."""
    equal = resolve(
        pyramid.equal,
        table=None,
        server=CachePolicy(),
        length=length,
        slots=length,
        num_layers=layers,
        num_kv_heads=heads,
    )
    dealt = resolve(
        CachePolicy(),
        table=pyramid.table(equal, length),
        server=CachePolicy(),
        length=length,
        slots=length,
        num_layers=layers,
        num_kv_heads=heads,
    )
    found = np.array(dealt.head_budgets)
    assert found.sum() == layers * heads * equal.budget
    assert np.abs(found - found.mean(axis=1, keepdims=True)).max() < 1
    assert {recent for row in dealt.head_recents for recent in row} == {equal.recent}
    return found.mean(axis=1)


def test_slots_fall_by_the_same_number_from_nearly_twice_the_mean_to_a_twentieth_of_it() -> None:
    equal = CachePolicy(alpha=1.0, budget=124, recent=20, sinks=4, prefill_chunk=0)
    # 24 are reserved everywhere. Of the other 100, the top layer gets 5 and the lowest 195.
    assert slots(Pyramid(equal=equal), 512).tolist() == pytest.approx(
        [219, 171.5, 124, 76.5, 29], abs=0.5
    )


def test_the_lowest_layer_keeps_all_of_a_short_sequence() -> None:
    equal = CachePolicy(alpha=1.0, budget=124, recent=20, sinks=4)
    assert slots(Pyramid(equal=equal), 200).tolist() == pytest.approx(
        [200, 162, 124, 86, 48], abs=0.5
    )


@given(st.integers(20, 400), st.floats(0.15, 0.9), st.floats(0, 0.9), st.integers(0, 8))
def test_bytes_are_those_of_equal_slots_and_every_layer_can_take_part(
    length: int, ratio: float, share: float, sinks: int
) -> None:
    if round(ratio * length) < sinks + 2:
        return
    equal = CachePolicy(alpha=0.9, budget_ratio=ratio, recent_share=share, sinks=sinks)
    found = slots(Pyramid(equal=equal), length)
    assert (np.diff(found) <= 1).all()
    assert found.max() <= length


def test_a_pyramid_is_resolved_like_any_candidate(tiny_model: LoadedModel) -> None:
    equal = CachePolicy(alpha=0.9, budget_ratio=0.3, recent_share=0.25, sinks=4, prefill_chunk=7)
    policy = effective(Pyramid(equal=equal), tiny_model, 100)
    assert (policy.budget, policy.sinks, policy.prefill_chunk) == (30, 4, 7)
    assert {alpha for row in policy.alpha for alpha in row} == {0.9}
    first, _, last = policy.head_budgets
    assert first > last


def test_a_pyramid_is_made_of_a_policy_only() -> None:
    with pytest.raises(ValidationError):
        Pyramid.model_validate({"equal": {"alpha": 3.0}})


def test_adakv_splits_slots_at_the_end_of_a_prompt_and_is_refused_without_one(
    tiny_model: LoadedModel,
) -> None:
    equal = CachePolicy(alpha=0.9, budget_ratio=0.3, recent_share=0.25, sinks=4, prefill_chunk=7)
    policy = effective(AdaKV(equal=equal), tiny_model, 100)
    assert policy == effective(equal, tiny_model, 100).model_copy(update={"pooled_floor": FLOOR})
    steps = AdaKV(equal=equal.model_copy(update={"prefill_chunk": 1}))
    with pytest.raises(InvalidArgument, match=r"^prefill_chunk: 1 reads a prompt step by step"):
        effective(steps, tiny_model, 100)
