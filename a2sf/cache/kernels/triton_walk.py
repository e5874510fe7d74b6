"""Runs the tokens of texts through one layer, one after the other, in one kernel launch.

Owns `walk` (an `passes.DecodePass` per token, in one layer) and `HeadSlots` (the location of
each head's slots). Needs Triton (extra `gpu`). Knows nothing of models.

A program processes all tokens of one row and KV head, so no two programs use the same slots. The
programs with the most work start first. Every token reads all keys and values in use again; they
come from the device's L2 cache if it is large enough.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
import triton
from torch import Tensor

from a2sf.cache import kernels
from a2sf.cache.kernels import triton_walk_programs
from a2sf.cache.kernels.decode import LEAST_DOT, NUM_STAGES, SCORE_BLOCK, tile_slots
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots

NUM_WARPS = 8
"""Warps per program: twice as many as in a decode step, because there is only one program per row
and head. With four warps, some shapes do not fit into registers."""


@dataclass(frozen=True)
class HeadSlots:
    """The slots of one layer. Each head may start anywhere and have any number of slots.

    The slots of a head are contiguous. Memory between heads is not used.
    """

    keys: Tensor
    """Used as flat memory: D numbers per slot, in the model's dtype."""
    values: Tensor
    """The same layout as `keys`."""
    position: Tensor
    """int32, used as flat memory: one number per slot, `EMPTY` in slots without a token."""
    score: Tensor
    """float32, the same layout as `position`."""
    vectors: Tensor
    """[rows, H_kv] int64: index of each head's first slot in `keys` and `values`, in slots."""
    marks: Tensor
    """[rows, H_kv] int64: index of each head's first slot in `position` and `score`."""
    width: Tensor
    """[rows, H_kv] int64: number of slots of each head."""
    widest: int
    """The largest of these numbers."""

    @classmethod
    def of(cls, slots: Slots, layer: int) -> Self:
        """Return a view of one layer of `slots`."""
        keys, values, locations = slots.keys[layer], slots.values[layer], slots.head_locations
        rows, _, dim = keys.shape
        assert keys.stride() == values.stride()
        assert keys.stride()[1:] == (dim, 1), "slots of a row must be contiguous"
        assert slots.score.stride() == slots.position.stride()
        assert slots.score.stride(1) == 1
        row = torch.arange(rows, device=keys.device)[:, None]
        width = locations.width[layer]
        return cls(
            keys=keys,
            values=values,
            position=slots.position,
            score=slots.score,
            vectors=row * (keys.stride(0) // dim) + locations.vectors[layer],
            marks=row * slots.score.stride(0) + locations.marks[layer],
            width=width.expand(rows, -1).contiguous(),
            widest=max(slots.layout.slots[layer]),
        )


def walk(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    slots: HeadSlots,
    policy: PolicyTensors,
    start: Tensor,
    end: Tensor,
    scale: float,
    output: Tensor,
    visible: Tensor | None = None,
) -> None:
    """Run tokens of each row through one layer; for each: place, attend, accumulate, evict.

    Writes keys, values, positions and scores into the slots. There is no device sync.

    Args:
        query: [rows, H_q, width, D] in the slots' dtype, rotated; the last dimension contiguous.
        keys, values: [rows, H_kv, width, D], likewise.
        slots: the rows; the first min(start, budget) slots of each head hold its tokens, and it has
            at least min(end, budget) slots.
        policy: the rows' policies in this layer.
        start, end: [rows] int64: the tokens start .. end - 1 of each row are run. These are both
            their indices in `query`, `keys` and `values` and their positions. If end <= start, the
            row does not change.
        scale: factor on the logits.
        output: [rows, H_q, width, D] in the query's dtype; receives the attention output of these
            tokens. Other elements do not change.
        visible: [rows, H_kv, side, side] bool, or None. Element [.., i, p] becomes whether query i
            could attend to the token at position p, for the queries of these tokens.
    """
    rows, q_heads, _, dim = query.shape
    kv_heads = keys.shape[1]
    assert query.dtype in kernels.DTYPES
    assert dim <= kernels.LARGEST_HEAD_DIM
    assert slots.keys.dtype == slots.values.dtype == keys.dtype == values.dtype == query.dtype
    assert output.dtype == query.dtype
    assert all(t.stride(3) == 1 for t in (query, keys, values, output))
    assert len(policy.alpha) == 1
    assert visible is None or (visible.is_contiguous() and visible.dtype == torch.bool)

    budget = policy.budget[0].contiguous()
    # Estimate of the slots that each head reads, summed over its tokens.
    work = torch.minimum(budget, end[:, None]) * (end - start).clamp(min=0)[:, None]
    device = query.device
    logits = torch.empty(rows, q_heads, slots.widest, dtype=torch.float32, device=device)
    lse = torch.empty(rows, q_heads, dtype=torch.float32, device=device)
    # Triton launches on the current device, not on the tensors' device; -1 is the processor.
    with torch.cuda.device(query.get_device()):
        triton_walk_programs.walk[rows * kv_heads,](
            query,
            keys,
            values,
            output,
            slots.keys,
            slots.values,
            slots.score,
            slots.position,
            logits,
            lse,
            None if visible is None else visible.view(torch.uint8),
            work.flatten().argsort(descending=True),
            slots.vectors,
            slots.marks,
            slots.width,
            start,
            end,
            policy.alpha[0].contiguous(),
            budget,
            policy.recent[0].contiguous(),
            policy.sinks[:, None].expand(rows, kv_heads).contiguous(),
            policy.random_seed,
            policy.first_heads,
            scale * math.log2(math.e),
            slots.widest,
            0 if visible is None else visible.shape[-1],
            *query.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            *output.stride()[:3],
            KV_HEADS=kv_heads,
            GROUP=q_heads // kv_heads,
            GROUP_PAD=max(triton.next_power_of_2(q_heads // kv_heads), LEAST_DOT),
            DIM=dim,
            DIM_PAD=max(triton.next_power_of_2(dim), LEAST_DOT),
            BLOCK=tile_slots(dim, query.dtype),
            SCORE_BLOCK=SCORE_BLOCK,
            SCORED=policy.any_scored,
            RECORDED=visible is not None,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            # Scores must round like the reference: after the decay, and after the sum.
            enable_fp_fusion=False,
        )
