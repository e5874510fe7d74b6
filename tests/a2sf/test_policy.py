"""A wish for a cache policy becomes plain numbers, or is refused by name."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from a2sf.cache.budgets import resolve, slots_for, split_slots
from a2sf.errors import InvalidArgument, InvalidRequest
from a2sf.policy import CachePolicy, EffectivePolicy
from tests.tables import IDENTITY, make_table


def settle(wish: CachePolicy, **arguments: Any) -> EffectivePolicy:
    settings: dict[str, Any] = {
        "table": None,
        "server": CachePolicy(preset="h2o", budget=64),
        "length": 100,
        "slots": 128,
        "num_layers": 2,
        "num_kv_heads": 2,
        **arguments,
    }
    return resolve(wish, **settings)


@pytest.mark.parametrize(
    ("wish", "alpha", "budget", "recent", "sinks"),
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
    wish: CachePolicy, alpha: float, budget: int, recent: int, sinks: int
) -> None:
    policy = settle(wish)
    assert policy.alpha == ((alpha, alpha), (alpha, alpha))
    assert (policy.budget, policy.recent, policy.sinks) == (budget, recent, sinks)
    assert policy.prefill_chunk == 0


def test_a_ratio_is_rounded_to_the_nearest_with_halves_up() -> None:
    for length in range(1, 400):
        policy = settle(CachePolicy(alpha=1.0, budget_ratio=0.5, sinks=0), length=length, slots=400)
        assert policy.budget == (length + 1) // 2


def test_a_request_goes_over_its_table_and_the_table_over_the_server() -> None:
    table = make_table(IDENTITY, budget=24, recent=4, sinks=2, prefill_chunk=8)
    server = CachePolicy(preset="h2o", budget=64, sinks=1, prefill_chunk=16)
    wish = CachePolicy(table=table.name)
    policy = settle(wish, table=table, server=server)
    assert (policy.budget, policy.recent, policy.sinks, policy.prefill_chunk) == (24, 4, 2, 8)
    assert policy.alpha == table.policy.alpha
    assert (policy.table_name, policy.table_sha256) == (table.name, table.sha256)

    wish = CachePolicy(table=table.name, budget_ratio=0.3, recent_share=0.5, sinks=0)
    policy = settle(wish, table=table, server=server)
    assert (policy.budget, policy.recent, policy.sinks, policy.prefill_chunk) == (30, 14, 0, 8)

    policy = settle(CachePolicy(preset="h2o"), server=server)
    assert (policy.budget, policy.recent, policy.sinks, policy.prefill_chunk) == (64, 31, 1, 16)


def test_a_server_may_default_to_a_table() -> None:
    table = make_table(IDENTITY, budget=24)
    policy = settle(
        CachePolicy(budget=30), table=table, server=CachePolicy(table=table.name, budget=99)
    )
    assert (policy.method, policy.budget) == ("table", 30)


def test_only_random_carries_a_seed() -> None:
    assert settle(CachePolicy(preset="random")).random_seed == 0
    assert settle(CachePolicy(preset="random", random_seed=9)).random_seed == 9
    assert settle(CachePolicy(preset="h2o")).random_seed is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"alpha": -0.1}, "greater than or equal to 0"),
        ({"alpha": float("nan")}, "finite"),
        ({"budget": 0}, "greater than or equal to 1"),
        ({"budget_ratio": 0.0}, "greater than 0"),
        ({"budget_ratio": 1.01}, "less than or equal to 1"),
        ({"budget": 5, "budget_ratio": 0.5}, "at most one of budget, budget_ratio"),
        ({"recent": 5, "recent_share": 0.5}, "at most one of recent, recent_share"),
        ({"alpha": 0.5, "preset": "h2o"}, "at most one of preset, table, alpha"),
        ({"preset": "h2o", "recent": 5}, "sets its own recent window"),
        ({"preset": "full", "budget": 5}, "keeps every token"),
        ({"preset": "h2o", "random_seed": 5}, "random only"),
        ({"preset": "h20"}, r"^preset: 'h20'; accepted: full, .*; did you mean h2o\?$"),
        ({"preset": "nonsense"}, "'nonsense'; accepted: full, window, h2o, tova_per_head, random$"),
        ({"budgit": 3}, r"^budgit: no such field; accepted: preset, .*; did you mean budget\?$"),
        ({"sinks": -1}, "greater than or equal to 0"),
        ({"min_budget": -1}, "greater than or equal to 0"),
        ({"min_budgt": 3}, r"^min_budgt: no such field; .*; did you mean min_budget\?$"),
    ],
)
def test_a_wish_that_contradicts_itself_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        CachePolicy(**fields)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (CachePolicy(alpha=0.5, budget=4), "sinks 4"),
        (CachePolicy(alpha=0.5, budget=10, recent=6), "need 11"),
        (CachePolicy(alpha=0.5, budget=129), "at most 128 slots"),
        (CachePolicy(preset="window", budget=3), "sinks 4"),
    ],
)
def test_a_budget_that_cannot_hold_what_it_protects_is_refused(
    wish: CachePolicy, says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        settle(wish)


def test_a_ratio_of_too_little_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="less than one slot"):
        settle(CachePolicy(alpha=0.5, budget_ratio=0.001))


@pytest.mark.parametrize(
    ("wish", "length", "budget", "told"),
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
def test_a_ratio_comes_to_no_fewer_slots_than_the_floor_nor_to_more_than_the_request_needs(
    wish: dict[str, Any], length: int, budget: int, told: int | None
) -> None:
    policy = settle(CachePolicy(alpha=0.5, **wish), length=length)
    assert (policy.budget, policy.min_budget) == (budget, told)
    assert policy.head_budgets == ((budget, budget), (budget, budget))


def test_the_floor_is_the_request_s_else_the_table_s_else_the_server_s() -> None:
    server = CachePolicy(alpha=0.5, budget=64, min_budget=30)
    plain = make_table(IDENTITY, budget=None, budget_ratio=0.2)
    own = make_table(IDENTITY, budget=None, budget_ratio=0.2, min_budget=40)
    none = make_table(IDENTITY, budget=None, budget_ratio=0.2, min_budget=0)
    named = CachePolicy(table="made-up")
    asked = CachePolicy(table="made-up", min_budget=50)
    for wish, table, budget in [
        (named, plain, 30),
        (named, own, 40),
        (named, none, 20),
        (asked, plain, 50),
        (asked, own, 50),
        (CachePolicy(table="made-up", min_budget=0), own, 20),
        # Whosever ratio it is.
        (CachePolicy(table="made-up", budget_ratio=0.1), own, 40),
        (CachePolicy(table="made-up", budget=21), own, 21),
        (CachePolicy(budget_ratio=0.1), None, 30),
        (CachePolicy(), None, 64),
        (CachePolicy(preset="full"), None, 100),
    ]:
        assert settle(wish, table=table, server=server).budget == budget


def test_a_table_s_shares_deal_the_floor() -> None:
    arguments = shaped((1.5, 0.5), (1.5, 0.5), budget=None, budget_ratio=0.2, sinks=1, recent=1)
    wish = CachePolicy(table="made-up", min_budget=40)
    assert settle(wish, **arguments).head_budgets == ((60, 20), (60, 20))
    assert settle(wish, length=50, **arguments).head_budgets == ((50, 30), (50, 30))
    assert settle(wish, length=30, **arguments).head_budgets == ((30, 30), (30, 30))


def test_a_sequence_that_is_kept_whole_needs_no_room_for_what_it_protects() -> None:
    table = make_table(IDENTITY, budget=None, budget_ratio=0.2, recent=50, sinks=4)
    wish = CachePolicy(table="made-up", min_budget=64)
    assert settle(wish, table=table, length=20).budget == 20
    assert settle(CachePolicy(preset="window", budget_ratio=1.0), length=3).budget == 3
    with pytest.raises(InvalidArgument, match="need 55"):
        settle(CachePolicy(table="made-up", min_budget=30), table=table)


def test_a_floor_that_no_row_has_room_for_is_refused_by_name() -> None:
    wish = CachePolicy(alpha=0.5, budget_ratio=0.2, min_budget=150)
    with pytest.raises(
        InvalidArgument,
        match=r"^cache_policy\.min_budget: min_budget 150 raises the budget to 150 tokens; "
        r"accepted: at most 128 slots; lower min_budget or raise --slots$",
    ):
        settle(wish, length=400)
    assert settle(wish, length=100).budget == 100


def test_a_server_s_window_is_of_its_own_method_and_of_no_preset() -> None:
    server = CachePolicy(alpha=0.9, recent_share=0.5, budget=64)
    assert settle(CachePolicy(), server=server).recent == 29
    assert settle(CachePolicy(alpha=0.3), server=server).recent == 29
    for preset in ("tova_per_head", "random"):
        assert settle(CachePolicy(preset=preset), server=server).recent == 0
        assert settle(CachePolicy(preset=preset, recent=7), server=server).recent == 7


def test_a_server_s_preset_keeps_the_server_s_window() -> None:
    server = CachePolicy(preset="tova_per_head", recent=10, budget=32)
    assert settle(CachePolicy(), server=server).recent == 10
    assert settle(CachePolicy(recent=3), server=server).recent == 3
    assert settle(CachePolicy(preset="random"), server=server).recent == 0


SHARES = st.integers(1, 4).flatmap(
    lambda heads: st.lists(
        st.lists(st.floats(1e-3, 1e3), min_size=heads, max_size=heads), min_size=1, max_size=10
    )
)


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [number for row in rows for number in row]


@given(st.integers(1, 5000), SHARES, st.integers(1, 5000))
def test_all_slots_are_dealt_and_no_head_gets_more_than_it_can_use(
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
    # Written out: hand the excess on until nobody has any.
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
def test_no_head_gets_less_than_it_needs_to_take_part_where_the_budget_suffices(
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


def test_a_short_sequence_leaves_every_head_of_a_table_room_for_what_it_protects() -> None:
    """A fifth of 40 tokens is 8 slots, of which the smallest share alone would leave one."""
    table = shaped((0.2, 1.4), (0.4, 2.0), budget=None, budget_ratio=0.2, recent=1, sinks=4)
    policy = settle(CachePolicy(table="made-up"), length=40, slots=200, **table)
    slots = flat(policy.head_budgets)
    assert sum(slots) == 4 * 8
    assert min(slots) == 6
    # A request that protects less leaves the shares as they are fitted.
    less = settle(CachePolicy(table="made-up", recent=0, sinks=0), length=40, slots=200, **table)
    assert flat(less.head_budgets) == [2, 11, 3, 16]


def test_what_the_least_shares_are_lifted_by_the_others_give() -> None:
    assert split_slots(10, ((1.0, 4.0), (1.0, 14.0)), 100, 5) == ((5, 7), (5, 23))
    assert split_slots(10, ((1.0, 4.0), (1.0, 14.0)), 20, 5) == ((5, 10), (5, 20))
    # Where the budget itself does not suffice, nobody is lifted beyond it.
    assert split_slots(3, ((1.0, 2.0),), 100, 5) == ((3, 3),)


def test_what_a_head_cannot_use_goes_to_the_others_by_their_shares() -> None:
    assert split_slots(100, ((2.0, 1.0, 1.0),), 1000) == ((150, 75, 75),)
    assert split_slots(100, ((7.0,), (1.0,), (2.0,)), 150) == ((150,), (50,), (100,))
    assert split_slots(100, ((7.0, 1.0), (2.0, 2.0)), 120) == ((120, 56), (112, 112))
    assert split_slots(100, ((7.0, 1.0), (2.0, 2.0)), 100) == ((100, 100), (100, 100))
    # Of 20 slots the running totals are 2.2, 4.4, 6.7 and 20.
    assert split_slots(5, ((1.0, 1.0), (1.0, 6.0)), 15) == ((2, 2), (3, 13))


@given(st.integers(1, 500), SHARES)
def test_slots_for_a_budget_give_every_head_that_much_and_hardly_more(
    budget: int, shares: list[list[float]]
) -> None:
    slots, most = slots_for(budget, shares), 10**9
    assert min(flat(split_slots(slots, shares, most))) >= budget
    assert min(flat(split_slots(slots - 1, shares, most))) <= budget


def shaped(*shares: tuple[float, ...], **policy: Any) -> dict[str, Any]:
    """Arguments for a model of as many layers and heads as shares, and its table."""
    sizes = {"num_layers": len(shares), "num_kv_heads": len(shares[0])}
    identity = IDENTITY.model_copy(update=sizes)
    return {"table": make_table(identity, head_share=shares, **policy), **sizes}


def test_a_table_s_shares_deal_the_slots_and_each_head_protects_its_share() -> None:
    table = shaped((2.0, 1.0), (0.8, 0.2), budget=30, recent=None, recent_share=0.5, sinks=1)
    policy = settle(CachePolicy(table="made-up"), **table)
    assert policy.head_budgets == ((60, 30), (24, 6))
    assert policy.head_recents == ((29, 14), (11, 2))
    assert (policy.budget, policy.recent) == (30, 14)

    policy = settle(CachePolicy(table="made-up", budget=60, recent=7), **table)
    # What the widest cannot use of a sequence of 100 goes to the others.
    assert policy.head_budgets == ((100, 70), (56, 14))
    assert policy.head_recents == ((7, 7), (7, 7))

    policy = settle(CachePolicy(table="made-up", budget=100), **table)
    assert policy.head_budgets == ((100, 100), (100, 100))

    for wish in (CachePolicy(preset="h2o"), CachePolicy(alpha=0.5, recent_share=0.3)):
        policy = settle(wish, num_layers=3)
        assert policy.head_budgets == ((64, 64),) * 3
        assert policy.head_recents == ((policy.recent,) * 2,) * 3


def test_a_process_holds_the_slots_of_its_own_heads() -> None:
    table = shaped((4.0, 3.0, 2.0, 1.0), (1.0, 1.0, 1.0, 3.0), budget=40, recent=3, sinks=0)
    policy = settle(CachePolicy(table="made-up"), slots=200, **table)
    first, second = (policy.model_copy(update={"local_heads": heads}) for heads in ((0, 2), (2, 4)))
    assert policy.local_budgets == policy.head_budgets == ((80, 60, 40, 20), (20, 20, 20, 60))
    assert (first.local_budgets, second.local_budgets) == (
        ((80, 60), (20, 20)),
        ((40, 20), (20, 60)),
    )
    assert second.local_recents == ((3, 3), (3, 3))
    assert second.local_alpha == tuple(row[2:] for row in policy.alpha)


def test_a_table_that_is_being_fitted_resolves_as_it_will_when_it_is_sealed() -> None:
    table = shaped((3.0, 1.0), (1.0, 2.0), budget_ratio=0.3, budget=None)["table"]
    sealed = settle(CachePolicy(table=table.name), table=table)
    bare = settle(CachePolicy(), table=table.policy, server=CachePolicy())
    assert bare.table_name is None
    assert bare == sealed.model_copy(update={"table_name": None, "table_sha256": None})


@pytest.mark.parametrize(
    ("wish", "slots", "says"),
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
def test_a_head_that_gets_too_few_slots_or_too_many_is_named(
    wish: dict[str, Any], slots: Any, says: str
) -> None:
    arguments = shaped((2.0, 9.6), (1.0, 4.4), sinks=0, recent=0)
    if "table" not in wish:
        del arguments["table"]
    else:
        wish = {"sinks": 0, "recent": 0, **wish}
    with pytest.raises(InvalidArgument) as caught:
        settle(CachePolicy(**wish), **arguments, length=200, slots=slots)
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
        settle(CachePolicy(**requested), table=made)
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
        settle(CachePolicy(**requested), server=CachePolicy(**server), length=400)
    assert (caught.value.field, caught.value.problem) == (f"cache_policy{field}", says)
