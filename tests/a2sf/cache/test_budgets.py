"""A requested policy becomes plain numbers for every head."""

from typing import Any

import pytest

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy
from tests.policies import flat, resolve_for_test, table_with_shares
from tests.tables import IDENTITY, make_table


@pytest.mark.parametrize(
    ("requested_policy", "alpha", "budget", "recent", "sinks"),
    [
        (CachePolicy(preset="full"), 1.0, 100, 0, 0),
        (CachePolicy(preset="window", budget=20), 1.0, 20, 15, 4),
        (CachePolicy(preset="h2o", budget=21), 1.0, 21, 8, 4),
        (CachePolicy(preset="h2o", budget=20, sinks=0), 1.0, 20, 10, 0),
        (CachePolicy(preset="tova_per_head", budget=20), 0.0, 20, 0, 4),
        (CachePolicy(preset="random", budget=20, recent=6), 1.0, 20, 6, 4),
        (CachePolicy(alpha=0.25, budget=20, sinks=0), 0.25, 20, 0, 0),
        (CachePolicy(alpha=0.25, budget_ratio=0.205), 0.25, 21, 0, 4),
        (CachePolicy(alpha=0.25, budget=25, recent_share=0.33), 0.25, 25, 6, 4),
        (CachePolicy(), 1.0, 64, 30, 4),
    ],
)
def test_presets_ratios_and_shares_become_tokens(
    requested_policy: CachePolicy, alpha: float, budget: int, recent: int, sinks: int
) -> None:
    policy = resolve_for_test(requested_policy)
    assert policy.alpha == ((alpha, alpha), (alpha, alpha))
    assert (policy.budget, policy.recent, policy.sinks) == (budget, recent, sinks)
    assert policy.prefill_chunk == 0


def test_a_ratio_is_rounded_to_the_nearest_with_halves_up() -> None:
    for length in range(1, 400):
        policy = resolve_for_test(
            CachePolicy(alpha=1.0, budget_ratio=0.5, sinks=0), length=length, slots=400
        )
        assert policy.budget == (length + 1) // 2


def test_request_fields_override_the_table_and_the_table_overrides_the_server() -> None:
    table = make_table(IDENTITY, budget=24, recent=4, sinks=2, prefill_chunk=8)
    server = CachePolicy(preset="h2o", budget=64, sinks=1, prefill_chunk=16)
    requested_policy = CachePolicy(table=table.name)
    policy = resolve_for_test(requested_policy, table=table, server=server)
    assert (policy.budget, policy.recent, policy.sinks, policy.prefill_chunk) == (24, 4, 2, 8)
    assert policy.alpha == table.policy.alpha
    assert (policy.table_name, policy.table_sha256) == (table.name, table.sha256)

    requested_policy = CachePolicy(table=table.name, budget_ratio=0.3, recent_share=0.5, sinks=0)
    policy = resolve_for_test(requested_policy, table=table, server=server)
    assert (policy.budget, policy.recent, policy.sinks, policy.prefill_chunk) == (30, 14, 0, 8)

    policy = resolve_for_test(CachePolicy(preset="h2o"), server=server)
    assert (policy.budget, policy.recent, policy.sinks, policy.prefill_chunk) == (64, 31, 1, 16)


def test_the_default_of_the_server_may_be_a_table() -> None:
    table = make_table(IDENTITY, budget=24)
    policy = resolve_for_test(
        CachePolicy(budget=30), table=table, server=CachePolicy(table=table.name, budget=99)
    )
    assert (policy.method, policy.budget) == ("table", 30)


def test_only_the_random_preset_has_a_seed() -> None:
    assert resolve_for_test(CachePolicy(preset="random")).random_seed == 0
    assert resolve_for_test(CachePolicy(preset="random", random_seed=9)).random_seed == 9
    assert resolve_for_test(CachePolicy(preset="h2o")).random_seed is None


@pytest.mark.parametrize(
    ("requested_policy", "length", "budget", "min_budget"),
    [
        # A fifth of 7 tokens would be 1.
        ({"budget_ratio": 0.2, "min_budget": 64}, 7, 7, 64),
        ({"budget_ratio": 0.2, "min_budget": 64}, 64, 64, 64),
        ({"budget_ratio": 0.2, "min_budget": 64}, 100, 64, 64),
        ({"budget_ratio": 0.64, "min_budget": 64}, 100, 64, None),
        ({"budget_ratio": 0.8, "min_budget": 64}, 100, 80, None),
        ({"budget_ratio": 1.0, "min_budget": 64}, 3, 3, None),
        ({"budget_ratio": 0.001, "min_budget": 5}, 100, 5, 5),
        ({"budget_ratio": 0.2, "min_budget": 0}, 100, 20, None),
        ({"budget": 20, "min_budget": 64}, 100, 20, None),
    ],
)
def test_min_budget_raises_a_ratio_up_to_the_length_of_the_request(
    requested_policy: dict[str, Any], length: int, budget: int, min_budget: int | None
) -> None:
    policy = resolve_for_test(CachePolicy(alpha=0.5, **requested_policy), length=length)
    assert (policy.budget, policy.min_budget) == (budget, min_budget)
    assert policy.head_budgets == ((budget, budget), (budget, budget))


def test_min_budget_comes_from_the_request_then_the_table_then_the_server() -> None:
    server = CachePolicy(alpha=0.5, budget=64, min_budget=30)
    plain = make_table(IDENTITY, budget=None, budget_ratio=0.2)
    own = make_table(IDENTITY, budget=None, budget_ratio=0.2, min_budget=40)
    none = make_table(IDENTITY, budget=None, budget_ratio=0.2, min_budget=0)
    named = CachePolicy(table="made-up")
    asked = CachePolicy(table="made-up", min_budget=50)
    for requested_policy, table, budget in [
        (named, plain, 30),
        (named, own, 40),
        (named, none, 20),
        (asked, plain, 50),
        (asked, own, 50),
        (CachePolicy(table="made-up", min_budget=0), own, 20),
        # min_budget also applies to the ratio of another source.
        (CachePolicy(table="made-up", budget_ratio=0.1), own, 40),
        (CachePolicy(table="made-up", budget=21), own, 21),
        (CachePolicy(budget_ratio=0.1), None, 30),
        (CachePolicy(), None, 64),
        (CachePolicy(preset="full"), None, 100),
    ]:
        assert resolve_for_test(requested_policy, table=table, server=server).budget == budget


def test_the_shares_of_a_table_split_min_budget() -> None:
    arguments = table_with_shares(
        (1.5, 0.5), (1.5, 0.5), budget=None, budget_ratio=0.2, sinks=1, recent=1
    )
    requested_policy = CachePolicy(table="made-up", min_budget=40)
    assert resolve_for_test(requested_policy, **arguments).head_budgets == ((60, 20), (60, 20))
    assert resolve_for_test(requested_policy, length=50, **arguments).head_budgets == (
        (50, 30),
        (50, 30),
    )
    assert resolve_for_test(requested_policy, length=30, **arguments).head_budgets == (
        (30, 30),
        (30, 30),
    )


def test_a_sequence_without_evictions_needs_no_room_for_protected_tokens() -> None:
    table = make_table(IDENTITY, budget=None, budget_ratio=0.2, recent=50, sinks=4)
    requested_policy = CachePolicy(table="made-up", min_budget=64)
    assert resolve_for_test(requested_policy, table=table, length=20).budget == 20
    assert resolve_for_test(CachePolicy(preset="window", budget_ratio=1.0), length=3).budget == 3
    with pytest.raises(InvalidArgument, match="need 55"):
        resolve_for_test(CachePolicy(table="made-up", min_budget=30), table=table)


def test_a_preset_of_the_request_does_not_take_the_window_of_the_server() -> None:
    server = CachePolicy(alpha=0.9, recent_share=0.5, budget=64)
    assert resolve_for_test(CachePolicy(), server=server).recent == 29
    assert resolve_for_test(CachePolicy(alpha=0.3), server=server).recent == 29
    for preset in ("tova_per_head", "random"):
        assert resolve_for_test(CachePolicy(preset=preset), server=server).recent == 0
        assert resolve_for_test(CachePolicy(preset=preset, recent=7), server=server).recent == 7


def test_a_preset_of_the_server_keeps_the_window_of_the_server() -> None:
    server = CachePolicy(preset="tova_per_head", recent=10, budget=32)
    assert resolve_for_test(CachePolicy(), server=server).recent == 10
    assert resolve_for_test(CachePolicy(recent=3), server=server).recent == 3
    assert resolve_for_test(CachePolicy(preset="random"), server=server).recent == 0


def test_every_head_has_room_for_protected_tokens_in_a_short_sequence() -> None:
    """A fifth of 40 tokens is 8 slots; the smallest share alone would be one slot."""
    table = table_with_shares(
        (0.2, 1.4), (0.4, 2.0), budget=None, budget_ratio=0.2, recent=1, sinks=4
    )
    policy = resolve_for_test(CachePolicy(table="made-up"), length=40, slots=200, **table)
    slots = flat(policy.head_budgets)
    assert sum(slots) == 4 * 8
    assert min(slots) == 6
    # For a request that protects less, the fitted shares do not change.
    less = resolve_for_test(
        CachePolicy(table="made-up", recent=0, sinks=0), length=40, slots=200, **table
    )
    assert flat(less.head_budgets) == [2, 11, 3, 16]


def test_the_shares_of_a_table_split_the_slots_and_size_the_windows() -> None:
    table = table_with_shares(
        (2.0, 1.0), (0.8, 0.2), budget=30, recent=None, recent_share=0.5, sinks=1
    )
    policy = resolve_for_test(CachePolicy(table="made-up"), **table)
    assert policy.head_budgets == ((60, 30), (24, 6))
    assert policy.head_recents == ((29, 14), (11, 2))
    assert (policy.budget, policy.recent) == (30, 14)

    policy = resolve_for_test(CachePolicy(table="made-up", budget=60, recent=7), **table)
    # Slots beyond the sequence of 100 tokens go to the other heads.
    assert policy.head_budgets == ((100, 70), (56, 14))
    assert policy.head_recents == ((7, 7), (7, 7))

    policy = resolve_for_test(CachePolicy(table="made-up", budget=100), **table)
    assert policy.head_budgets == ((100, 100), (100, 100))

    for requested_policy in (CachePolicy(preset="h2o"), CachePolicy(alpha=0.5, recent_share=0.3)):
        policy = resolve_for_test(requested_policy, num_layers=3)
        assert policy.head_budgets == ((64, 64),) * 3
        assert policy.head_recents == ((policy.recent,) * 2,) * 3


def test_a_table_resolves_alike_before_and_after_it_is_sealed() -> None:
    table = table_with_shares((3.0, 1.0), (1.0, 2.0), budget_ratio=0.3, budget=None)["table"]
    sealed = resolve_for_test(CachePolicy(table=table.name), table=table)
    bare = resolve_for_test(CachePolicy(), table=table.policy, server=CachePolicy())
    assert bare.table_name is None
    assert bare == sealed.model_copy(update={"table_name": None, "table_sha256": None})
