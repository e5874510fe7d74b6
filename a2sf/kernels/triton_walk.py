"""The tokens of some texts through one layer, one after the other, in one launch.

Owns `walk` (what `attention.DecodePass` does, token by token, in one layer) and `HeadSlots` (where
each head's slots lie). Needs Triton, which the extra `gpu` brings. Knows nothing of models.

A program carries one row and KV head from its first token to its last, and no two touch the same
slots; those with the most to do begin first. What is read again with every token, the keys and
values in use, comes from the device's L2 cache where that is large enough.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
import triton
from torch import Tensor

from a2sf import kernels
from a2sf.cache import PolicyTensors, Slots
from a2sf.kernels import triton_walk_programs
from a2sf.kernels.decode import LEAST_DOT, NUM_STAGES, SETTLE_BLOCK, tile_slots

NUM_WARPS = 8
"""That share a program's work: twice a decode step's, for there are only as many programs as heads.
With four, some shapes do not fit into their registers."""


@dataclass(frozen=True)
class HeadSlots:
    """The slots of one layer, head by head: each head's begin anywhere and are of any number.

    The slots of a head lie one after the other. What lies between heads is nobody's.
    """

    keys: Tensor
    """In memory from the first element on: slots of D numbers each, in the model's dtype."""
    values: Tensor
    """Likewise, in the same places."""
    position: Tensor
    """int32, `EMPTY` where no token is: in memory from the first element on, one a slot."""
    score: Tensor
    """float32, in the same places."""
    vectors: Tensor
    """[rows, H_kv] int64: each head's first slot in `keys` and `values`, counted in slots."""
    marks: Tensor
    """[rows, H_kv] int64: the same in `position` and `score`."""
    width: Tensor
    """[rows, H_kv] int64: each head's slots."""
    widest: int
    """The most of them."""

    @classmethod
    def of(cls, slots: Slots, layer: int) -> Self:
        """Return a layer of slots, in the same memory."""
        keys, values, places = slots.keys[layer], slots.values[layer], slots.places
        rows, _, dim = keys.shape
        assert keys.stride() == values.stride()
        assert keys.stride()[1:] == (dim, 1), "slots of a row lie one after the other"
        assert slots.score.stride() == slots.position.stride()
        assert slots.score.stride(1) == 1
        row = torch.arange(rows, device=keys.device)[:, None]
        width = places.width[layer]
        return cls(
            keys=keys,
            values=values,
            position=slots.position,
            score=slots.score,
            vectors=row * (keys.stride(0) // dim) + places.vectors[layer],
            marks=row * slots.score.stride(0) + places.marks[layer],
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
    seen: Tensor | None = None,
) -> None:
    """Carry tokens of each row through one layer: place, attend, accumulate, evict, in turn.

    Writes keys, values, positions and scores into the slots. Nothing is asked of the device.

    Args:
        query: [rows, H_q, width, D] in the slots' dtype, rotated; the last dimension contiguous.
        keys, values: [rows, H_kv, width, D], likewise.
        slots: the rows; the first min(start, budget) slots of each head hold its tokens, and it has
            as many as min(end, budget).
        policy: the rows' policies in this one layer.
        start: [rows] int64, the first token of each row that goes through: its place in `query`,
            `keys` and `values`, and its position.
        end: [rows] int64, the first token behind them that does not; from `start` down it leaves a
            row as it is.
        scale: factor on the logits.
        output: [rows, H_q, width, D] in the query's dtype, which gets the attention output; what
            belongs to no token is left as it is.
        seen: [rows, H_kv, side, side] bool, or None. For each of these queries, place [.., its
            position, position of a token] becomes whether it was given that token.
    """
    rows, q_heads, _, dim = query.shape
    kv_heads = keys.shape[1]
    assert query.dtype in kernels.DTYPES
    assert dim <= kernels.LARGEST_HEAD_DIM
    assert slots.keys.dtype == slots.values.dtype == keys.dtype == values.dtype == query.dtype
    assert output.dtype == query.dtype
    assert all(t.stride(3) == 1 for t in (query, keys, values, output))
    assert len(policy.alpha) == 1
    assert seen is None or (seen.is_contiguous() and seen.dtype == torch.bool)

    budget = policy.budget[0].contiguous()
    # Slots that each head reads, all its tokens together, or nearly.
    work = torch.minimum(budget, end[:, None]) * (end - start).clamp(min=0)[:, None]
    device = query.device
    logits = torch.empty(rows, q_heads, slots.widest, dtype=torch.float32, device=device)
    lse = torch.empty(rows, q_heads, dtype=torch.float32, device=device)
    # Triton launches on the current device, whichever the tensors are on; -1 is the processor.
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
            None if seen is None else seen.view(torch.uint8),
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
            0 if seen is None else seen.shape[-1],
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
            SETTLE_BLOCK=SETTLE_BLOCK,
            SCORED=policy.any_scored,
            WATCHED=seen is not None,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            # Scores round as the reference's do: after the decay, and after the sum.
            enable_fp_fusion=False,
        )
