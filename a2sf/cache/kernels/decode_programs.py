"""Triton programs of one decode step in one layer.

Owns the programs for a row and KV head: they attend to the slots with `slot_attention`, and then
update the scores with `score_update`. Knows only the strides of the tensors; `decode` launches
them.

`attend` runs once for each row, KV head and split of the slots. With one split it also updates the
scores; with several, `close` joins the splits and then updates the scores. The logits are stored,
and loaded again after the softmax is normalised. They take `GROUP` floats per slot, so they stay in
L2; in registers, they would take 16 (a tensor core's minimum) for every slot of the row.
"""

# Triton infers types; compile-time constants are capitalised.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl

from a2sf.cache.kernels.score_update import finish_step, slots_in_use
from a2sf.cache.kernels.slot_attention import attend_slots

# A layer's slice of the policy tables has any alignment, and a prompt's rows have any width. By
# default, Triton would compile a program for each case, while serving.
_TABLES = (
    *("start", "plan", "alpha", "budget", "recent", "sinks", "random_seed", "first_head"),
    *("marks", "width", "order"),
)
_ANYWHERE = (*_TABLES, "score", "position")


@triton.jit
def pair_of(order, KV_HEADS: tl.constexpr):
    """The row and KV head of this program. Heads with the most slots start first."""
    # 64 bits: a slab may have more than 2^31 elements.
    program = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0) // KV_HEADS
    return program % rows, tl.load(order + program // rows)


@triton.jit(do_not_specialize_on_alignment=(*_ANYWHERE, "vectors"))
def attend(
    query,
    new_keys,
    new_values,
    keys,
    values,
    output,
    lse,
    logits,
    score,
    position,
    plan,
    start,
    alpha,
    budget,
    recent,
    sinks,
    random_seed,
    first_head,
    vectors,
    marks,
    width,
    order,
    scale,
    room,
    query_row,
    query_head,
    new_keys_row,
    new_keys_head,
    new_values_row,
    new_values_head,
    slots_row,
    score_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SCORED: tl.constexpr,
):
    """Attend to one split of the slots of a row and KV head, and write the new token.

    `output` [pairs, GROUP, SPLITS, DIM] is normalised over the split; `lse` [pairs, GROUP, SPLITS]
    is log2 of its normaliser, -inf for an empty split. `scale` includes the factor log2(e).
    """
    row, head = pair_of(order, KV_HEADS)
    pair = row * KV_HEADS + head
    split = tl.program_id(1)
    slots = tl.load(width + head).to(tl.int32)
    in_use = slots_in_use(start, budget, row, pair, slots)
    slot = tl.load(plan + pair).to(tl.int32)
    # Slots are divided evenly in whole tiles. In a head with few slots, some splits are idle.
    chunk = BLOCK * tl.cdiv(slots, BLOCK * SPLITS)
    begin = split * chunk
    end = tl.minimum(begin + chunk, in_use)

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    heads = g < GROUP
    dims = d < DIM
    both = heads[:, None] & dims[None, :]
    query_heads = pair * GROUP + g
    q = tl.load(
        query + row * query_row + (head * GROUP + g)[:, None] * query_head + d[None, :],
        mask=both,
        other=0.0,
    )
    new_key = tl.load(
        new_keys + row * new_keys_row + head * new_keys_head + d, mask=dims, other=0.0
    )
    new_value = tl.load(
        new_values + row * new_values_row + head * new_values_head + d, mask=dims, other=0.0
    )

    slab = row * slots_row + tl.load(vectors + head) * DIM
    got, normaliser = attend_slots(
        q,
        new_key,
        new_value,
        keys + slab,
        values + slab,
        logits + pair * GROUP * room,
        slot,
        begin,
        end,
        begin + chunk,
        scale,
        room,
        GROUP,
        GROUP_PAD,
        DIM,
        DIM_PAD,
        BLOCK,
        SCORED,
        # Keys and values are read once per step: they should not evict the logits from L2.
        "evict_first",
    )
    at = query_heads * SPLITS + split
    tl.store(output + at[:, None] * DIM + d[None, :], got, mask=both)
    tl.store(lse + at, normaliser, mask=heads)
    if SPLITS == 1:
        # Other threads of this program load the logits.
        tl.debug_barrier()
        finish_step(
            logits,
            lse,
            score,
            position,
            plan,
            start,
            alpha,
            budget,
            recent,
            sinks,
            random_seed,
            first_head,
            row,
            head,
            tl.load(marks + head),
            slots,
            room,
            score_row,
            KV_HEADS,
            GROUP,
            SCORE_BLOCK,
            SCORED,
        )


@triton.jit(do_not_specialize_on_alignment=_ANYWHERE)
def close(
    split_output,
    split_lse,
    output,
    lse,
    logits,
    score,
    position,
    plan,
    start,
    alpha,
    budget,
    recent,
    sinks,
    random_seed,
    first_head,
    marks,
    width,
    order,
    room,
    score_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SCORE_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SCORED: tl.constexpr,
):
    """Join the splits of a row and KV head, and update its scores; tensors as in `attend`."""
    row, head = pair_of(order, KV_HEADS)
    pair = row * KV_HEADS + head
    s = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, DIM_PAD)
    dims = d < DIM
    for g in tl.static_range(GROUP):
        query_head = pair * GROUP + g
        at = query_head * SPLITS + s
        some = s < SPLITS
        each = tl.load(split_lse + at, mask=some, other=float("-inf"))
        # Never -inf: one of the splits has the new token.
        highest = tl.max(each, axis=0)
        joined = highest + tl.log2(tl.sum(tl.exp2(each - highest), axis=0))
        got = tl.load(
            split_output + at[:, None] * DIM + d[None, :],
            mask=some[:, None] & dims[None, :],
            other=0.0,
        )
        share = tl.exp2(each - joined)
        tl.store(output + query_head * DIM + d, tl.sum(got * share[:, None], axis=0), mask=dims)
        tl.store(lse + query_head, joined)
    # Other threads of this program load the joined normalisers.
    tl.debug_barrier()
    finish_step(
        logits,
        lse,
        score,
        position,
        plan,
        start,
        alpha,
        budget,
        recent,
        sinks,
        random_seed,
        first_head,
        row,
        head,
        tl.load(marks + head),
        tl.load(width + head).to(tl.int32),
        room,
        score_row,
        KV_HEADS,
        GROUP,
        SCORE_BLOCK,
        SCORED,
    )
