"""A policy that does not fit is refused by a field of the request, with the numbers."""

from typing import Any

import pytest

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy
from tests.policies import resolve_for_test, table_with_shares
from tests.tables import IDENTITY, make_table


@pytest.mark.parametrize(
    ("requested_policy", "says"),
    [
        (CachePolicy(alpha=0.5, budget=4), "sinks 4"),
        (CachePolicy(alpha=0.5, budget=10, recent=6), "need 11"),
        (CachePolicy(alpha=0.5, budget=129), "at most 128 slots"),
        (CachePolicy(preset="window", budget=3), "sinks 4"),
    ],
)
def test_a_budget_without_room_or_beyond_the_row_is_refused(
    requested_policy: CachePolicy, says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        resolve_for_test(requested_policy)


def test_a_ratio_of_less_than_one_slot_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="less than one slot"):
        resolve_for_test(CachePolicy(alpha=0.5, budget_ratio=0.001))


def test_a_min_budget_beyond_the_row_is_refused_by_name() -> None:
    requested_policy = CachePolicy(alpha=0.5, budget_ratio=0.2, min_budget=150)
    with pytest.raises(
        InvalidArgument,
        match=r"^cache_policy\.min_budget: min_budget 150 raises the budget to 150 tokens; "
        r"accepted: at most 128 slots; lower min_budget or raise --slots$",
    ):
        resolve_for_test(requested_policy, length=400)
    assert resolve_for_test(requested_policy, length=100).budget == 100


@pytest.mark.parametrize(
    ("requested_policy", "slots", "says"),
    [
        (
            {"table": "made-up", "budget": 5, "recent": 3, "sinks": 2},
            128,
            "budget is 5 tokens, and sinks 2 + recent 3 + 1 for the newest need 6; raise budget, "
            "or lower sinks or recent",
        ),
        (
            {"table": "made-up", "budget": 70},
            128,
            "budget is 70 tokens per head on average, and head_share gives layer 0 head 1 158 "
            "slots; accepted: at most 128 slots in every head; lower budget or raise --slots",
        ),
        (
            {"table": "made-up", "budget": 42},
            ((24, 96), (20, 42)),
            "budget is 42 tokens per head on average, and head_share gives layer 1 head 1 43 "
            "slots; layer 1 head 1 has 42 slots (rows follow head_share); lower budget or raise "
            "--slots",
        ),
        (
            {"preset": "h2o", "budget": 51},
            ((200, 200), (50, 60)),
            "budget is 51 tokens in every head; layer 1 head 0 has 50 slots (rows follow "
            "head_share); lower budget or raise --slots",
        ),
        (
            {"preset": "full"},
            ((200, 199), (50, 60)),
            "prompt + max_new is 200 tokens and preset full keeps them all; layer 1 head 0 has "
            "50 slots (rows follow head_share); shorten the request or raise --slots",
        ),
    ],
)
def test_the_error_names_the_head_that_does_not_fit(
    requested_policy: dict[str, Any], slots: Any, says: str
) -> None:
    arguments = table_with_shares((2.0, 9.6), (1.0, 4.4), sinks=0, recent=0)
    if "table" not in requested_policy:
        del arguments["table"]
    else:
        requested_policy = {"sinks": 0, "recent": 0, **requested_policy}
    with pytest.raises(InvalidArgument) as caught:
        resolve_for_test(CachePolicy(**requested_policy), **arguments, length=200, slots=slots)
    assert caught.value.problem == says


@pytest.mark.parametrize(
    ("requested", "table", "field", "says"),
    [
        (
            {"alpha": 0.5, "budget": 5, "recent": 3, "sinks": 2},
            None,
            "budget",
            "budget is 5 tokens, and sinks 2 + recent 3 + 1 for the newest need 6; raise budget, "
            "or lower sinks or recent",
        ),
        (
            {"alpha": 0.5, "budget_ratio": 0.05, "sinks": 9},
            None,
            "budget_ratio",
            "budget_ratio 0.05 of 100 tokens is 5 tokens, and sinks 9 + recent 0 + 1 for the "
            "newest need 10; raise budget_ratio, or lower sinks or recent",
        ),
        (
            {"alpha": 0.5, "budget_ratio": 0.05, "min_budget": 8, "sinks": 9},
            None,
            "min_budget",
            "min_budget 8 raises the budget to 8 tokens, and sinks 9 + recent 0 + 1 for the newest "
            "need 10; raise min_budget, or lower sinks or recent",
        ),
        (
            {"table": "made-up", "recent": 20},
            {"budget": None, "budget_ratio": 0.1},
            "recent",
            "the table's budget_ratio 0.1 of 100 tokens is 10 tokens, and sinks 4 + recent 20 + 1 "
            "for the newest need 25; raise budget_ratio, or lower sinks or recent",
        ),
        (
            {"alpha": 0.5, "sinks": 70},
            None,
            "sinks",
            "the server's budget is 64 tokens, and sinks 70 + recent 0 + 1 for the newest need 71; "
            "raise budget, or lower sinks or recent",
        ),
        (
            {"preset": "full", "sinks": 100},
            None,
            "sinks",
            "prompt + max_new is 100 tokens and preset full keeps them all, and sinks 100 + "
            "recent 0 + 1 for the newest need 101; lower sinks or recent",
        ),
    ],
)
def test_an_error_about_protected_tokens_names_a_field_of_the_request(
    requested: dict[str, Any], table: dict[str, Any] | None, field: str, says: str
) -> None:
    made = None if table is None else make_table(IDENTITY, sinks=4, recent=0, **table)
    with pytest.raises(InvalidArgument) as caught:
        resolve_for_test(CachePolicy(**requested), table=made)
    assert (caught.value.field, caught.value.problem) == (f"cache_policy.{field}", says)


@pytest.mark.parametrize(
    ("requested", "server", "field", "says"),
    [
        (
            {"alpha": 0.5, "budget_ratio": 0.5},
            {"preset": "h2o", "budget": 64},
            ".budget_ratio",
            "budget_ratio 0.5 of 400 tokens is 200 tokens; accepted: at most 128 slots; lower "
            "budget_ratio or raise --slots",
        ),
        (
            {"preset": "h2o"},
            {"alpha": 0.5, "budget": 129},
            ".preset",
            "the server's budget is 129 tokens; accepted: at most 128 slots; lower budget or raise "
            "--slots",
        ),
        (
            {"alpha": 0.5, "budget_ratio": 0.1},
            {"alpha": 0.5, "budget": 64, "min_budget": 150},
            ".budget_ratio",
            "the server's min_budget 150 raises the budget to 150 tokens; accepted: at most 128 "
            "slots; lower min_budget or raise --slots",
        ),
        (
            {},
            {"preset": "full"},
            "",
            "prompt + max_new is 400 tokens and preset full keeps them all; accepted: at most 128 "
            "slots; shorten the request or raise --slots",
        ),
    ],
)
def test_an_error_about_slots_names_a_field_of_the_request(
    requested: dict[str, Any], server: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve_for_test(CachePolicy(**requested), server=CachePolicy(**server), length=400)
    assert (caught.value.field, caught.value.problem) == (f"cache_policy{field}", says)
