"""A wish for a cache policy becomes plain numbers, or is refused by name."""

from typing import Any

import pytest
from pydantic import ValidationError

from a2sf.errors import InvalidArgument
from a2sf.policy import CachePolicy, EffectivePolicy, resolve
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
        ({"preset": "nonsense"}, "'full', 'window', 'h2o'"),
        ({"sinks": -1}, "greater than or equal to 0"),
    ],
)
def test_a_wish_that_contradicts_itself_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
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
