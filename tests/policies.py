"""Resolved policies for tests."""

from collections.abc import Sequence
from typing import Any

from a2sf.cache.budgets import resolve
from a2sf.policy import CachePolicy, EffectivePolicy
from tests.tables import IDENTITY, make_table


def resolve_for_test(requested_policy: CachePolicy, **arguments: Any) -> EffectivePolicy:
    """Resolve a policy, by default for 100 tokens on a server with 128 slots."""
    settings: dict[str, Any] = {
        "table": None,
        "server": CachePolicy(preset="h2o", budget=64),
        "length": 100,
        "slots": 128,
        "num_layers": 2,
        "num_kv_heads": 2,
        **arguments,
    }
    return resolve(requested_policy, **settings)


def table_with_shares(*shares: tuple[float, ...], **policy: Any) -> dict[str, Any]:
    """Arguments for a table with these shares, and a model with as many layers and heads."""
    sizes = {"num_layers": len(shares), "num_kv_heads": len(shares[0])}
    identity = IDENTITY.model_copy(update=sizes)
    return {"table": make_table(identity, head_share=shares, **policy), **sizes}


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [number for row in rows for number in row]
