"""The slots of all heads are split in proportion to their shares, within limits."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from a2sf.cache.slot_shares import max_slots_per_head, slots_for, split_slots
from tests.policies import flat

SHARES = st.integers(1, 4).flatmap(
    lambda heads: st.lists(
        st.lists(st.floats(1e-3, 1e3), min_size=heads, max_size=heads), min_size=1, max_size=10
    )
)


@given(st.integers(1, 5000), SHARES, st.integers(1, 5000))
def test_all_slots_are_split_and_no_head_gets_more_than_the_sequence(
    budget: int, shares: list[list[float]], length: int
) -> None:
    by_layer = split_slots(budget, shares, length)
    assert [len(row) for row in by_layer] == [len(row) for row in shares]
    assert split_slots(budget, [[8 * share for share in row] for row in shares], length) == by_layer
    shares, slots = flat(shares), flat(by_layer)
    assert sum(slots) == budget * len(shares)
    if budget >= length:
        assert set(slots) == {budget}
    else:
        assert all(0 <= count <= length for count in slots)
    # Rounding may take or give one.
    for one, mine in zip(shares, slots, strict=True):
        for other, theirs in zip(shares, slots, strict=True):
            assert one < other or mine >= theirs - 1


@given(st.integers(1, 5000), st.floats(1e-300, 1e300), st.integers(1, 100), st.integers(1, 5000))
def test_equal_shares_get_equal_slots(budget: int, share: float, layers: int, length: int) -> None:
    assert split_slots(budget, [[share] * 3] * layers, length) == ((budget,) * 3,) * layers


@given(st.integers(1, 500), SHARES, st.integers(1, 5000))
def test_slots_are_proportional_to_shares_below_the_cap(
    budget: int, shares: list[list[float]], length: int
) -> None:
    assume(budget < length)
    slots = flat(split_slots(budget, shares, length))
    shares = flat(shares)
    # Written out: pass the excess on until no head has any.
    target = [0.0] * len(shares)
    while True:
        left = budget * len(shares) - sum(target)
        open_to = [i for i, count in enumerate(target) if count < length]
        if left < 1e-6 or not open_to:
            break
        weight = sum(shares[i] for i in open_to)
        for i in open_to:
            target[i] = min(target[i] + left * shares[i] / weight, length)
    for count, want in zip(slots, target, strict=True):
        assert abs(count - want) < 1 + 1e-3


@given(st.integers(1, 500), SHARES, st.integers(1, 5000), st.integers(1, 100))
def test_every_head_gets_the_minimum_if_the_budget_is_large_enough(
    budget: int, shares: list[list[float]], length: int, least: int
) -> None:
    slots = flat(split_slots(budget, shares, length, least))
    assert sum(slots) == budget * len(slots)
    assert min(slots) >= min(budget, least)
    assert max(slots) <= max(budget, length)
    free = [(s, n) for s, n in zip(flat(shares), slots, strict=True) if least < n < length]
    # The others divide the rest in proportion; rounding may take or give one.
    for one, mine in free:
        for other, theirs in free:
            assert abs(mine * other - theirs * one) <= 1.001 * (one + other)


def test_slots_that_small_shares_gain_come_from_the_other_heads() -> None:
    assert split_slots(10, ((1.0, 4.0), (1.0, 14.0)), 100, 5) == ((5, 7), (5, 23))
    assert split_slots(10, ((1.0, 4.0), (1.0, 14.0)), 20, 5) == ((5, 10), (5, 20))
    # No head is raised above a budget that is below the minimum.
    assert split_slots(3, ((1.0, 2.0),), 100, 5) == ((3, 3),)


def test_slots_that_a_head_cannot_use_go_to_the_others_by_share() -> None:
    assert split_slots(100, ((2.0, 1.0, 1.0),), 1000) == ((150, 75, 75),)
    assert split_slots(100, ((7.0,), (1.0,), (2.0,)), 150) == ((150,), (50,), (100,))
    assert split_slots(100, ((7.0, 1.0), (2.0, 2.0)), 120) == ((120, 56), (112, 112))
    assert split_slots(100, ((7.0, 1.0), (2.0, 2.0)), 100) == ((100, 100), (100, 100))
    # Of 20 slots the running totals are 2.2, 4.4, 6.7 and 20.
    assert split_slots(5, ((1.0, 1.0), (1.0, 6.0)), 15) == ((2, 2), (3, 13))


@given(st.integers(1, 500), SHARES, st.integers(1, 2000) | st.just(10**9))
@example(128, [[4.0, 1.0, 0.5]], 400)
def test_slots_for_returns_the_fewest_slots_that_give_every_head_the_budget(
    budget: int, shares: list[list[float]], most: int
) -> None:
    slots = slots_for(budget, shares, most)
    assert min(flat(split_slots(slots, shares, most))) >= budget
    assert min(flat(split_slots(slots - 1, shares, most))) <= budget


@pytest.mark.parametrize("budget", [64, 100, 512])
def test_equal_shares_never_take_more_slots_than_the_budget(budget: int) -> None:
    # In floats, the sum of ten shares of .1 is less than 1.
    assert max_slots_per_head(budget, ((0.1,) * 5,) * 2, 4096) == ((budget,) * 5,) * 2
