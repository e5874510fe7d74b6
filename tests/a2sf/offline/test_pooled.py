"""AdaKV's rule: the highest scores of all heads win a layer's slots; the sum does not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2sf.cache.budgets import resolve
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.pooled import pooled_budgets
from a2sf.offline.teacher_forcing import Example
from a2sf.policy import CachePolicy, EffectivePolicy


def resolved(
    heads: int, layers: int = 1, length: int = 200, **requested_policy: object
) -> EffectivePolicy:
    return resolve(
        CachePolicy.model_validate({"alpha": 0.9, "recent": 2, "sinks": 1, **requested_policy}),
        table=None,
        server=CachePolicy(),
        length=length,
        slots=length,
        num_layers=layers,
        num_kv_heads=heads,
    )


def prompts(scores: np.ndarray) -> Slots:
    """Whole prompts in order, with these scores [rows, heads, tokens]."""
    rows, heads, tokens = scores.shape
    slots = Slots.empty(
        rows=rows,
        slots=((tokens,) * heads,),
        head_dim=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    slots.whole.position[0] = torch.arange(tokens, dtype=torch.int32)
    slots.whole.score[0] = torch.tensor(scores, dtype=torch.float32)
    return slots


def pooled(scores: np.ndarray, policy: EffectivePolicy, *floors: float | None) -> list[list[int]]:
    rows, _, tokens = scores.shape
    tensors = PolicyTensors.stack([policy] * rows, [200] * rows, torch.device("cpu"))
    length = torch.full((rows,), tokens)
    return pooled_budgets(prompts(scores), length, tensors, floors)[0].tolist()


def written_out(scores: np.ndarray, policy: EffectivePolicy, floor: float) -> list[int]:
    """The rule for one row, [heads, tokens], by sorting all tokens of all heads."""
    heads, tokens = scores.shape
    free = policy.budget - policy.sinks - policy.recent - 1
    candidates = [
        (-np.float32(scores[head, at]), head, at)
        for head in range(heads)
        for at in range(policy.sinks, tokens - policy.recent)
    ]
    if len(candidates) <= free * heads:
        return [policy.budget] * heads
    winners = [head for _, head, _ in sorted(candidates)[: free * heads]]
    total, before, found = 0.0, 0, []
    for head in range(heads):
        total += (1 - floor) * winners.count(head) + floor * free
        upto = int(np.floor(total + 0.5)) if head < heads - 1 else free * heads
        found.append(policy.sinks + policy.recent + 1 + upto - before)
        before = upto
    return found


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(5, 30), st.floats(0, 1))
def test_budgets_equal_the_rule_written_out(
    seed: int, heads: int, budget: int, floor: float
) -> None:
    # All scores differ: ties would change the split between heads, but not the sum.
    scores = np.random.default_rng(seed).permutation(heads * 40).reshape(1, heads, 40) / 7
    policy = resolved(heads, budget=budget)
    (found,) = pooled(scores, policy, floor)
    assert found == written_out(scores[0], policy, floor)
    assert sum(found) == heads * budget
    assert min(found) >= policy.sinks + policy.recent + 1


def test_a_head_with_all_the_highest_scores_gets_the_pool_minus_the_floor() -> None:
    scores = np.stack([np.full(60, 5.0), np.full(60, 1.0)])[None]
    # 20 slots per head, 4 of them reserved. Of the pool of 32, the loser gets a fifth of 16.
    assert pooled(scores, resolved(2, budget=20), 0.2) == [[33, 7]]
    assert pooled(scores, resolved(2, budget=20), 0.0) == [[36, 4]]


def test_rows_without_the_rule_and_short_prompts_keep_their_slots() -> None:
    scores = np.stack([np.full(60, 5.0), np.full(60, 1.0)])[None].repeat(2, axis=0)
    assert pooled(scores, resolved(2, budget=20), None, 0.2) == [[20, 20], [33, 7]]
    assert pooled(scores[:1, :, :15], resolved(2, budget=20), 0.2) == [[20, 20]]


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(8, 30), st.integers(1, 9))
def test_a_head_that_evicted_during_the_prompt_does_not_grow(
    seed: int, heads: int, budget: int, block: int
) -> None:
    # The state after the last block of a prompt of 100 tokens, with older tokens evicted.
    stored = budget - 1 + block
    scores = np.random.default_rng(seed).permutation(heads * stored).reshape(1, heads, stored) / 7
    policy = resolved(heads, budget=budget)
    slots = prompts(scores)
    slots.whole.position[0] += 100 - stored
    slots.whole.position[0, :, :, 0] = 0
    tensors = PolicyTensors.stack([policy], [200], torch.device("cpu"))
    (found,) = pooled_budgets(slots, torch.tensor([100]), tensors, [0.2])[0].tolist()
    assert sum(found) == heads * budget
    assert max(found) <= stored


@pytest.fixture
def example() -> Example:
    tokens = tuple(torch.randint(5, 200, (60,), generator=torch.manual_seed(0)).tolist())
    return Example(token_ids=tokens, prompt_tokens=40, counted=tuple(range(40, 59)))


def test_teacher_forcing_applies_the_rule_to_each_row_separately(
    tiny_model: LoadedModel, example: Example
) -> None:
    heads, layers = tiny_model.shape.num_kv_heads, tiny_model.shape.num_layers
    plain = resolved(heads, layers, length=60, budget=14)
    shared = plain.model_copy(update={"pooled_floor": 0.2})
    equal = plain.model_copy(update={"pooled_floor": 1.0})
    short = replace(example, prompt_tokens=8)
    alone = [
        teacher_forcing.predict(tiny_model, [one], [policy])[0].logits
        for one, policy in ((example, plain), (example, shared), (short, shared))
    ]
    together = teacher_forcing.predict(
        tiny_model, [example, example, short], [plain, shared, shared], batch=8
    )
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.logits, theirs, atol=1e-4, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    (sure,) = teacher_forcing.predict(tiny_model, [example], [equal])
    torch.testing.assert_close(sure.logits, alone[0], atol=1e-4, rtol=1e-4)
