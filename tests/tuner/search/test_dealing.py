"""Dealing slots: totals are exact, floors hold, planted curves are divided as they should be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from a2sf.cache.budgets import split_slots
from tuner.search.dealing import deal, predicted
from tuner.search.space import shares

BUDGETS = (20, 60, 160)
MOST = 200


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


@given(measured(), st.integers(8, MOST), st.floats(0, 0.01))
def test_the_total_is_exact_and_no_head_gets_less_than_the_floor_or_more_than_the_sequence(
    costs: NDArray[np.float64], mean: int, noise: float
) -> None:
    dealt = deal(costs, BUDGETS, mean=mean, floor=8, most=MOST, noise=noise)
    assert dealt.shape == costs.shape[:2]
    assert dealt.sum() == mean * dealt.size
    assert dealt.min() >= 8
    assert dealt.max() <= MOST


@given(measured(), st.integers(8, MOST - 20), st.integers(0, 20))
def test_a_larger_total_takes_no_slot_from_any_head(
    costs: NDArray[np.float64], mean: int, more: int
) -> None:
    less = deal(costs, BUDGETS, mean=mean, floor=8, most=MOST)
    assert (deal(costs, BUDGETS, mean=mean + more, floor=8, most=MOST) >= less).all()


@given(measured(), st.floats(1.0, 100.0), st.integers(10, 100))
def test_a_head_that_costs_more_by_a_factor_gets_no_less(
    costs: NDArray[np.float64], factor: float, mean: int
) -> None:
    scaled = np.concatenate([costs[:, :1], costs[:, :1] * factor], axis=1)
    dealt = deal(scaled, BUDGETS, mean=mean, floor=5, most=MOST)
    # A tie is broken for the first.
    assert (dealt[:, 1] >= dealt[:, 0] - 1).all()


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(8, MOST))
def test_equal_curves_get_equal_slots(curve: list[float], mean: int) -> None:
    costs = np.broadcast_to(np.array(curve), (3, 2, 3))
    assert (deal(costs, BUDGETS, mean=mean, floor=8, most=MOST) == mean).all()


@given(measured(), st.permutations(range(3)))
def test_layers_in_another_order_get_the_same_slots_in_that_order(
    costs: NDArray[np.float64], order: list[int]
) -> None:
    three = np.concatenate([costs, 2 * costs, 3 * costs])[:3]
    order = [place for place in order if place < len(three)]
    dealt = deal(three, BUDGETS, mean=40, floor=8, most=MOST)
    # Save for the last slot, where several heads gain as much by it.
    other = deal(three[order], BUDGETS, mean=40, floor=8, most=MOST)
    assert np.abs(other - dealt[order]).max() <= 1


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
    found = predicted(costs, BUDGETS, at)
    np.testing.assert_allclose(found, power_laws(size.tolist(), power.tolist(), at), rtol=1e-6)
    dealt = deal(costs, BUDGETS, mean=mean, floor=5, most=MOST).astype(float)

    def cost(slots: NDArray[np.float64]) -> float:
        return float((size * slots**-power).sum())

    assert cost(dealt) <= cost(np.full((3, 2), float(mean))) * (1 + 1e-9)
    for giver in range(6):
        for taker in range(6):
            changed = dealt.copy().ravel()
            changed[giver] -= 1
            changed[taker] += 1
            if changed.min() >= 5 and changed.max() <= MOST:
                assert cost(changed.reshape(3, 2)) >= cost(dealt) * (1 - 1e-9)


def test_slots_go_from_heads_that_hardly_care_to_those_that_do() -> None:
    costs = power_laws([[1.0, 0.01], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    dealt = deal(costs, BUDGETS, mean=40, floor=8, most=MOST)
    # Where all fall with the first power, the best slots go with the root of the sizes.
    assert dealt[0, 0] == pytest.approx(10 * dealt[0, 1], rel=0.1) or dealt[0, 1] == 8
    assert dealt[0, 0] == pytest.approx(dealt[1, 1], abs=1)


def test_a_head_below_the_noise_gets_the_floor_and_does_not_gain_by_its_noise() -> None:
    costs = power_laws([[1.0], [1.0]], [[1.0], [1.0]])
    costs[1] = (0.0009, -0.0008, 0.0007)
    dealt = deal(costs, BUDGETS, mean=40, floor=8, most=MOST, noise=0.001)
    other = deal(np.stack([costs[0], -costs[1]]), BUDGETS, mean=40, floor=8, most=MOST, noise=0.001)
    assert dealt[0, 0] > 60
    np.testing.assert_array_equal(dealt, other)


def test_where_every_head_is_below_the_noise_all_get_the_same() -> None:
    costs = np.random.default_rng(0).normal(scale=1e-4, size=(4, 2, 3))
    assert (deal(costs, BUDGETS, mean=40, floor=8, most=MOST, noise=0.001) == 40).all()
    assert (deal(0 * costs, BUDGETS, mean=40, floor=8, most=MOST) == 40).all()


def test_one_budget_is_enough_to_tell_heads_apart() -> None:
    dealt = deal([[[4.0], [1.0]]], (30,), mean=30, floor=2, most=MOST)
    assert dealt.tolist() == [[40, 20]]


def test_a_curve_that_falls_faster_at_its_end_is_divided_as_a_convex_one() -> None:
    """A step down far out must not stay out of reach because the slots before it gain nothing."""
    step, slope = (1.0, 0.999, 0.01), (1.0, 0.9, 0.8)
    dealt = deal([[step, slope]], BUDGETS, mean=100, floor=8, most=MOST)
    assert dealt[0, 0] > 110


@given(measured())
def test_predictions_are_positive_and_never_rise(costs: NDArray[np.float64]) -> None:
    found = predicted(costs, BUDGETS, range(1, MOST))
    assert (found > 0).all()
    assert (np.diff(found, axis=-1) <= 1e-12 * found[..., :-1]).all()


@given(measured(), st.integers(10, 100))
def test_shares_have_mean_one_and_lead_back_to_the_slots(
    costs: NDArray[np.float64], mean: int
) -> None:
    dealt = deal(costs, BUDGETS, mean=mean, floor=8, most=MOST)
    weights = np.array(shares(dealt.tolist()))
    assert weights.mean() == pytest.approx(1, abs=1e-4)
    again = np.array(split_slots(mean, weights.tolist(), MOST))
    assert again.sum() == mean * dealt.size
    # The running total is rounded: half a slot at each end, and what four digits leave.
    assert np.abs(again - dealt).max() <= 1


@pytest.mark.parametrize(("floor", "mean", "most"), [(0, 5, 9), (6, 5, 9), (1, 10, 9)])
def test_what_cannot_be_dealt_is_refused(floor: int, mean: int, most: int) -> None:
    with pytest.raises(ValueError, match="accepted: 1 <= floor <= mean <= most"):
        deal([[[1.0]]], (5,), mean=mean, floor=floor, most=most)
