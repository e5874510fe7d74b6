"""Cache policies: valid combinations of fields, and the heads of one process."""

from typing import Any

import pytest

from a2sf.errors import InvalidRequest
from a2sf.policy import CachePolicy
from tests.policies import resolve_for_test, table_with_shares


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
        ({"preset": "h2o", "recent": 5}, "sets its own recent window; omit recent$"),
        ({"preset": "h2o", "recent_share": 0.5}, "sets its own recent window; omit recent_share$"),
        ({"preset": "full", "budget": 5}, "keeps every token; omit budget$"),
        ({"preset": "full", "budget_ratio": 0.5}, "keeps every token; omit budget_ratio$"),
        ({"preset": "h2o", "random_seed": 5}, "only for preset random"),
        ({"preset": "h20"}, r"^preset: 'h20'; accepted: full, .*; did you mean h2o\?$"),
        ({"preset": "nonsense"}, "'nonsense'; accepted: full, window, h2o, tova_per_head, random$"),
        ({"budgit": 3}, r"^budgit: no such field; accepted: preset, .*; did you mean budget\?$"),
        ({"sinks": -1}, "greater than or equal to 0"),
        ({"min_budget": -1}, "greater than or equal to 0"),
        ({"min_budgt": 3}, r"^min_budgt: no such field; .*; did you mean min_budget\?$"),
    ],
)
def test_invalid_and_contradictory_fields_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        CachePolicy(**fields)


def test_local_budgets_are_those_of_the_heads_of_the_process() -> None:
    table = table_with_shares(
        (4.0, 3.0, 2.0, 1.0), (1.0, 1.0, 1.0, 3.0), budget=40, recent=3, sinks=0
    )
    policy = resolve_for_test(CachePolicy(table="made-up"), slots=200, **table)
    first, second = (policy.model_copy(update={"local_heads": heads}) for heads in ((0, 2), (2, 4)))
    assert policy.local_budgets == policy.head_budgets == ((80, 60, 40, 20), (20, 20, 20, 60))
    assert (first.local_budgets, second.local_budgets) == (
        ((80, 60), (20, 20)),
        ((40, 20), (20, 60)),
    )
    assert second.local_recents == ((3, 3), (3, 3))
    assert second.local_alpha == tuple(row[2:] for row in policy.alpha)
