"""Cache policies: valid combinations of fields."""

from typing import Any

import pytest

from a2sf.errors import InvalidRequest
from a2sf.policy import CachePolicy


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
