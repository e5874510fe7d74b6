"""The policies of rows as tensors: which heads a process has."""

import torch

from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.policy import CachePolicy
from tests.policies import resolve_for_test, table_with_shares


def test_the_policy_of_a_process_is_the_one_of_its_heads() -> None:
    table = table_with_shares(
        (4.0, 3.0, 2.0, 1.0), (1.0, 1.0, 1.0, 3.0), budget=40, recent=3, sinks=0
    )
    policy = resolve_for_test(CachePolicy(table="made-up"), slots=200, **table)
    cpu = torch.device("cpu")
    whole = PolicyTensors.stack([policy], [1000], cpu)
    first, second = (
        PolicyTensors.stack([policy], [1000], cpu, heads) for heads in (slice(0, 2), slice(2, 4))
    )
    assert whole.budget.tolist() == [[[80, 60, 40, 20]], [[20, 20, 20, 60]]]
    assert first.budget.tolist() == [[[80, 60]], [[20, 20]]]
    assert second.budget.tolist() == [[[40, 20]], [[20, 60]]]
    assert second.recent.tolist() == [[[3, 3]], [[3, 3]]]
    assert second.alpha.tolist() == [[list(row[2:])] for row in policy.alpha]
    assert torch.equal(second.first_heads, first.first_heads + 2)
