"""Dealing slots: totals are exact, floors hold, planted curves are divided as they should be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from a2sf.cache.slot_shares import split_slots
from tuner.search.slot_split import predict_costs, split_by_cost
from tuner.search.space import shares

BUDGETS = (20, 60, 160)
MAX_SLOTS = 200


def power_laws(
    sizes: list[list[float]], powers: list[list[float]], at: tuple[int, ...] = BUDGETS
) -> NDArray[np.float64]:
    """Costs [layers, heads, at] of heads that cost size x slots^-power."""
    size, power = np.array(sizes)[..., None], np.array(powers)[..., None]
    return size * np.array(at, dtype=float) ** -power


@st.composite
def measured(draw: st.DrawFn) -> NDArray[np.float64]:
    """Costs of a few heads at the three budgets, of any sign and order, as noise makes them."""
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    count = layers * heads * len(BUDGETS)
    values = draw(st.lists(st.floats(-1e-3, 1.0), min_size=count, max_size=count))
    return np.array(values).reshape(layers, heads, len(BUDGETS))


@given(measured(), st.integers(8, MAX_SLOTS), st.floats(0, 0.01))
def test_the_total_is_exact_and_no_head_gets_less_than_the_floor_or_more_than_the_sequence(
    costs: NDArray[np.float64], mean: int, noise: float
) -> None:
    slots = split_by_cost(costs, BUDGETS, mean=mean, floor=8, max_slots=MAX_SLOTS, noise=noise)
    assert slots.shape == costs.shape[:2]
    assert slots.sum() == mean * slots.size
    assert slots.min() >= 8
    assert slots.max() <= MAX_SLOTS


@given(measured(), st.integers(8, MAX_SLOTS - 20), st.integers(0, 20))
def test_a_larger_total_gives_every_head_at_least_as_many_slots(
    costs: NDArray[np.float64], mean: int, more: int
) -> None:
    less = split_by_cost(costs, BUDGETS, mean=mean, floor=8, max_slots=MAX_SLOTS)
    assert (
        split_by_cost(costs, BUDGETS, mean=mean + more, floor=8, max_slots=MAX_SLOTS) >= less
    ).all()


@given(measured(), st.floats(1.0, 100.0), st.integers(10, 100))
def test_a_head_with_proportionally_higher_costs_gets_at_least_as_many_slots(
    costs: NDArray[np.float64], factor: float, mean: int
) -> None:
    scaled = np.concatenate([costs[:, :1], costs[:, :1] * factor], axis=1)
    slots = split_by_cost(scaled, BUDGETS, mean=mean, floor=5, max_slots=MAX_SLOTS)
    # A tie is broken for the first.
    assert (slots[:, 1] >= slots[:, 0] - 1).all()


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(8, MAX_SLOTS))
def test_equal_curves_get_equal_slots(curve: list[float], mean: int) -> None:
    costs = np.broadcast_to(np.array(curve), (3, 2, 3))
    assert (split_by_cost(costs, BUDGETS, mean=mean, floor=8, max_slots=MAX_SLOTS) == mean).all()


@given(measured(), st.permutations(range(3)))
def test_layers_in_another_order_get_the_same_slots_in_that_order(
    costs: NDArray[np.float64], order: list[int]
) -> None:
    three = np.concatenate([costs, 2 * costs, 3 * costs])[:3]
    order = [place for place in order if place < len(three)]
    slots = split_by_cost(three, BUDGETS, mean=40, floor=8, max_slots=MAX_SLOTS)
    # Save for the last slot, where several heads gain as much by it.
    other = split_by_cost(three[order], BUDGETS, mean=40, floor=8, max_slots=MAX_SLOTS)
    assert np.abs(other - slots[order]).max() <= 1


@given(
    st.lists(st.floats(0.01, 10), min_size=6, max_size=6),
    st.lists(st.floats(0.5, 3), min_size=6, max_size=6),
    st.integers(10, 150),
)
@settings(max_examples=50)
def test_planted_power_laws_are_found_and_cost_no_more_than_with_equal_slots_or_any_exchange(
    sizes: list[float], powers: list[float], mean: int
) -> None:
    size, power = np.array(sizes).reshape(3, 2), np.array(powers).reshape(3, 2)
    costs = power_laws(size.tolist(), power.tolist())
    at = (5, 33, 199)
    found = predict_costs(costs, BUDGETS, at)
    np.testing.assert_allclose(found, power_laws(size.tolist(), power.tolist(), at), rtol=1e-6)
    slots = split_by_cost(costs, BUDGETS, mean=mean, floor=5, max_slots=MAX_SLOTS).astype(float)

    def cost(slots: NDArray[np.float64]) -> float:
        return float((size * slots**-power).sum())

    assert cost(slots) <= cost(np.full((3, 2), float(mean))) * (1 + 1e-9)
    for giver in range(6):
        for taker in range(6):
            changed = slots.copy().ravel()
            changed[giver] -= 1
            changed[taker] += 1
            if changed.min() >= 5 and changed.max() <= MAX_SLOTS:
                assert cost(changed.reshape(3, 2)) >= cost(slots) * (1 - 1e-9)


def test_slots_go_from_heads_that_hardly_care_to_those_that_do() -> None:
    costs = power_laws([[1.0, 0.01], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    slots = split_by_cost(costs, BUDGETS, mean=40, floor=8, max_slots=MAX_SLOTS)
    # Where all fall with the first power, the best slots go with the root of the sizes.
    assert slots[0, 0] == pytest.approx(10 * slots[0, 1], rel=0.1) or slots[0, 1] == 8
    assert slots[0, 0] == pytest.approx(slots[1, 1], abs=1)


def test_a_head_below_the_noise_gets_the_floor_and_does_not_gain_by_its_noise() -> None:
    costs = power_laws([[1.0], [1.0]], [[1.0], [1.0]])
    costs[1] = (0.0009, -0.0008, 0.0007)
    slots = split_by_cost(costs, BUDGETS, mean=40, floor=8, max_slots=MAX_SLOTS, noise=0.001)
    other = split_by_cost(
        np.stack([costs[0], -costs[1]]), BUDGETS, mean=40, floor=8, max_slots=MAX_SLOTS, noise=0.001
    )
    assert slots[0, 0] > 60
    np.testing.assert_array_equal(slots, other)


def test_heads_with_costs_below_the_noise_get_equal_slots() -> None:
    costs = np.random.default_rng(0).normal(scale=1e-4, size=(4, 2, 3))
    assert (
        split_by_cost(costs, BUDGETS, mean=40, floor=8, max_slots=MAX_SLOTS, noise=0.001) == 40
    ).all()
    assert (split_by_cost(0 * costs, BUDGETS, mean=40, floor=8, max_slots=MAX_SLOTS) == 40).all()


def test_one_budget_is_enough_to_tell_heads_apart() -> None:
    slots = split_by_cost([[[4.0], [1.0]]], (30,), mean=30, floor=2, max_slots=MAX_SLOTS)
    assert slots.tolist() == [[40, 20]]


def test_a_curve_that_falls_faster_at_its_end_is_divided_as_a_convex_one() -> None:
    """A step down far out must not stay out of reach because the slots before it gain nothing."""
    step, slope = (1.0, 0.999, 0.01), (1.0, 0.9, 0.8)
    slots = split_by_cost([[step, slope]], BUDGETS, mean=100, floor=8, max_slots=MAX_SLOTS)
    assert slots[0, 0] > 110


@given(measured())
def test_predictions_are_positive_and_never_rise(costs: NDArray[np.float64]) -> None:
    found = predict_costs(costs, BUDGETS, range(1, MAX_SLOTS))
    assert (found > 0).all()
    assert (np.diff(found, axis=-1) <= 1e-12 * found[..., :-1]).all()


@given(measured(), st.integers(10, 100))
def test_shares_have_mean_one_and_lead_back_to_the_slots(
    costs: NDArray[np.float64], mean: int
) -> None:
    slots = split_by_cost(costs, BUDGETS, mean=mean, floor=8, max_slots=MAX_SLOTS)
    weights = np.array(shares(slots.tolist()))
    assert weights.mean() == pytest.approx(1, abs=1e-4)
    again = np.array(split_slots(mean, weights.tolist(), MAX_SLOTS))
    assert again.sum() == mean * slots.size
    # The running total is rounded: half a slot at each end, and what four digits leave.
    assert np.abs(again - slots).max() <= 1


@pytest.mark.parametrize(("floor", "mean", "max_slots"), [(0, 5, 9), (6, 5, 9), (1, 10, 9)])
def test_an_impossible_total_is_refused(floor: int, mean: int, max_slots: int) -> None:
    with pytest.raises(ValueError, match="accepted: 1 <= floor <= mean <= max_slots"):
        split_by_cost([[[1.0]]], (5,), mean=mean, floor=floor, max_slots=max_slots)
