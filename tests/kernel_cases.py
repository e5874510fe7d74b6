"""Checks of a decode kernel: one step, and a chain of steps.

Runs on a CUDA device, or without one in Triton's interpreter.
"""

import itertools
import random

import torch

from a2sf.cache.kernels import decode
from a2sf.cache.passes import DecodePass
from a2sf.cache.slots import Slots
from tests.head_slots import head_of
from tests.interpreting import DEVICE, SCORE_TOLERANCE
from tests.row_cases import TOLERANCE, Case, check_state, exact, make


def check(case: Case, steps: int, splits: int) -> None:
    """Decode some steps; compare each with the reference's step from the same state."""
    slots, policy, start = case.slots, case.policy, case.start.clone()
    kv_heads = policy.alpha.shape[2]
    workspace = decode.Workspace.empty(slots, kv_heads * case.group, splits)
    plan = decode.plan_slots(slots, policy, start)
    dtype = slots.keys[0].dtype
    for _ in range(steps):
        witness = exact(slots)
        reference = DecodePass(witness, policy, start)
        for layer in range(len(slots.keys)):
            tokens = case.tokens()
            output = decode.decode_attention(
                *tokens,
                slots=slots,
                layer=layer,
                policy=policy,
                start=start,
                plan=plan,
                scale=case.scale,
                workspace=workspace,
            )
            query, keys, values = (t.double() for t in tokens)
            want = reference(layer, query, keys, values, case.scale)
            assert output.dtype == dtype
            assert output.shape == want.shape
            torch.testing.assert_close(
                output.double(), want, rtol=0, atol=TOLERANCE[dtype] * float(want.abs().max())
            )
        every = torch.ones_like(start, dtype=torch.bool)
        check_state(case, witness, start + 1, every, SCORE_TOLERANCE)
        start += 1
        # From bit-equal scores, the plans must be equal.
        following = decode.plan_slots(slots, policy, start)
        evicting = start[:, None] >= policy.budget
        room = torch.tensor(slots.layout.slots, device=DEVICE)[:, None]
        relevant = evicting | (following < room)
        assert torch.equal(plan[relevant], following[relevant])
        assert (plan < room).all()


def random_case(seed: int) -> tuple[Case, int, int]:
    choose = random.Random(seed)
    small = choose.random() < 0.3
    case = make(
        seed,
        group=choose.choice([1, 2, 4, 7, 8]),
        dim=choose.choice([32, 32, 64, 80, 96, 128, 256]),
        dtype=choose.choice([torch.float32, torch.float16, torch.bfloat16]),
        rows=choose.randint(1, 3),
        kv_heads=choose.randint(1, 2),
        layers=choose.choice([1, 1, 2]),
        slots=(1, 6) if small else (1, 80),
        scored=choose.random() < 0.85,
        same_keys=choose.random() < 0.2,
    )
    return case, choose.choice([1, 2, 4]), choose.choice([1, 1, 2, 3, 5])


SERVED = (
    # As in models with 8 and 1 billion weights, and a shape that fills no tile.
    (4, 8, 128, torch.bfloat16),
    (4, 8, 64, torch.bfloat16),
    (7, 2, 80, torch.float16),
)
"""(query heads per KV head, KV heads, head size, dtype). Few, because each is compiled."""


def served_case(seed: int, most: int = 300) -> tuple[Case, int, int]:
    """As `random_case`, with served shapes and full tiles; rows of up to `most` slots."""
    choose = random.Random(seed)
    group, kv_heads, dim, dtype = choose.choice(SERVED)
    case = make(
        seed,
        group=group,
        dim=dim,
        dtype=dtype,
        rows=choose.randint(1, 3),
        kv_heads=kv_heads,
        layers=choose.choice([1, 1, 2]),
        slots=(1, 6) if choose.random() < 0.3 else (1, most),
        scored=choose.random() < 0.85,
        same_keys=choose.random() < 0.2,
        aligned=True,
    )
    return case, choose.choice([1, 2, 4]), choose.choice([1, 3])


NEAR_TIE = 1e-4
"""Largest relative gap of two scores that rounding may swap, after hundreds of steps."""


def _scores(slots: Slots, plan: torch.Tensor) -> torch.Tensor:
    """The score of one slot of each head, chosen by `plan` [layers, rows, H_kv]."""
    found = torch.zeros_like(plan, dtype=torch.float32)
    for layer, row, head in itertools.product(*map(range, plan.shape)):
        at = int(plan[layer, row, head])
        found[layer, row, head] = head_of(slots, layer, row, head).score[at]
    return found


def check_chain(case: Case, steps: int, splits: int) -> int | None:
    """Decode many steps in parallel with a reference that is never corrected.

    Returns the step in which the two evict differently at a near-tie, after which they hold
    different tokens for a valid reason; None if that never happens.
    """
    slots, policy = case.slots, case.policy
    witness, start = exact(slots), case.start.clone()
    workspace = decode.Workspace.empty(slots, policy.alpha.shape[2] * case.group, splits)
    plan = decode.plan_slots(slots, policy, start)
    dtype = slots.keys[0].dtype
    for step in range(steps):
        tokens = case.tokens()
        wanted = decode.plan_slots(witness, policy, start)
        if not torch.equal(plan, wanted):
            mine, theirs = (_scores(witness, p) for p in (plan, wanted))
            gap = float(((mine - theirs).abs() / torch.maximum(mine, theirs).clamp(1e-30)).max())
            assert gap <= NEAR_TIE, f"step {step}: the slots differ at a gap of {gap}"
            return step
        reference = DecodePass(witness, policy, start)
        query, keys, values = (t.double() for t in tokens)
        want = reference(0, query, keys, values, case.scale)
        output = decode.decode_attention(
            *tokens,
            slots=slots,
            layer=0,
            policy=policy,
            start=start,
            plan=plan,
            scale=case.scale,
            workspace=workspace,
        )
        torch.testing.assert_close(
            output.double(), want, rtol=0, atol=5 * TOLERANCE[dtype] * float(want.abs().max())
        )
        start += 1
    assert torch.equal(slots.position, witness.position)
    return None
