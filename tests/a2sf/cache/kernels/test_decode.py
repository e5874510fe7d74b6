"""The fused decode step equals `DecodePass`: outputs, scores, positions and next victims.

Without a CUDA device the programs run in Triton's interpreter on the processor.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

from a2sf.cache.kernels import decode, decode_programs, score_update
from a2sf.cache.passes import DecodePass
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.scoring import EMPTY
from a2sf.cache.slots import Slots
from tests.head_slots import head_of
from tests.interpreting import interpreting, poisoned
from tests.kernel_cases import check, check_chain, make, random_case, served_case
from tests.row_cases import owned


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with interpreting(score_update, decode_programs):
        yield


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned() -> Iterator[None]:
    """Fill the result of `torch.empty` with NaN, to detect unwritten memory."""
    with poisoned():
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles so small that rows with tens of slots take several."""
    monkeypatch.setattr(decode, "TILE_BYTES", 1)
    monkeypatch.setattr(decode, "SCORE_BLOCK", 32)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(40))
def test_a_step_equals_the_reference(seed: int) -> None:
    check(*random_case(seed))


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(40, 240))
def test_any_step_equals_the_reference(seed: int) -> None:
    check(*random_case(seed))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("splits", [1, 3])
def test_a_chain_of_evictions_equals_the_reference(splits: int) -> None:
    case = make(7, rows=2, slots=(9, 20), seen=8)
    assert check_chain(case, 24, splits) is None
    assert (case.start + 24 > case.policy.budget).all(), "every row has evicted"


def test_a_wrong_chain_of_evictions_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(7, rows=2, slots=(9, 20), methods=("a2sf",), seen=20)
    assert case.policy.sinks.max() < 8
    monkeypatch.setattr(DecodePass, "__init__", partialmethod(other_alpha, DecodePass.__init__))
    with pytest.raises(AssertionError):
        check_chain(case, 24, 1)


def other_alpha(
    reference: DecodePass,
    init: Callable[..., None],
    slots: Slots,
    policy: PolicyTensors,
    *rest: Any,
) -> None:
    init(reference, slots, replace(policy, alpha=policy.alpha * 0.7), *rest)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_with_served_shapes_equals_the_reference(seed: int) -> None:
    check(*served_case(seed, most=16))


def test_on_a_tie_the_oldest_token_is_evicted_first() -> None:
    case = make(3, rows=1, kv_heads=1, slots=(20, 20), methods=("a2sf",), seen=20)
    slots, policy = case.slots, case.policy
    policy.alpha.fill_(1.0)
    policy.sinks.fill_(2)
    policy.recent.fill_(10)
    slots.score.fill_(0.25)
    slots.keys[0].fill_(1.0)
    start = case.start
    plan = decode.plan_slots(slots, policy, start)
    workspace = decode.Workspace.empty(slots, 2, 1)
    query, keys, values = case.tokens()
    for evicted in (2, 3, 4, 5):
        assert int(slots.position[0, int(plan)]) == evicted
        # Equal keys get equal attention, in sums that are exact.
        decode.decode_attention(
            torch.full_like(query, 0.5),
            torch.ones_like(keys),
            values,
            slots=slots,
            layer=0,
            policy=policy,
            start=start,
            plan=plan,
            scale=0.1,
            workspace=workspace,
        )
        start += 1
        stored = head_of(slots, 0, 0, 0).stored()
        assert len({score for position, score in stored.items() if position < 20}) == 1


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_with_too_few_slots_never_writes_beyond_them(splits: int, small_tiles: None) -> None:
    case = make(5, rows=2, kv_heads=2, slots=(40, 40), methods=("a2sf",), seen=38)
    case.policy.budget.fill_(100)
    _, mine = owned(case)
    start = case.start
    plan = decode.plan_slots(case.slots, case.policy, start)
    workspace = decode.Workspace.empty(case.slots, 4, splits)
    for _ in range(4):
        decode.decode_attention(
            *case.tokens(),
            slots=case.slots,
            layer=0,
            policy=case.policy,
            start=start,
            plan=plan,
            scale=case.scale,
            workspace=workspace,
        )
        start += 1
        assert (plan < case.slots.layout.widest).all()
    # With one layer, keys have the same layout as scores.
    assert case.slab.keys[0][~mine].isnan().all()
    assert case.slab.score[~mine].isnan().all()
    assert (case.slab.position[~mine] == EMPTY).all()
