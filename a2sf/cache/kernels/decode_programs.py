"""Triton programs of one decode step in one layer.

Owns the device code for a row and KV head: it writes the new token's key and value, attends to the
slots, and then updates the scores with `score_update`. Knows only the strides of the tensors;
`decode` launches it.

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


@triton.jit
def attend_slots(
    q,
    new_key,
    new_value,
    keys,
    values,
    logits,
    slot,
    begin,
    end,
    stop,
    scale,
    room,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Write the new token to its slot, and attend to slots begin .. end - 1.

    This call writes the token, and attends to it, only if its slot is in begin .. stop - 1. `q`
    [GROUP_PAD, DIM_PAD], `new_key` and `new_value` [DIM_PAD] are zero in the padding; `keys`,
    `values` and `logits` [GROUP, room] point to this head's part. Returns the output, normalised
    over these slots, and log2 of the normalisers, [GROUP_PAD]; -inf if the slots are empty.
    """
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    heads = g < GROUP
    dims = d < DIM
    # The running softmax starts with the new token, from registers. The loads below skip its slot,
    # so neither its old content nor the timing of the stores matters.
    mine = (slot >= begin) & (slot < stop)
    new = slot.to(tl.int64) * DIM + d
    # Not `dims & mine`: the interpreter turns a scalar bool into an integer.
    placed = d < tl.where(mine, DIM, 0)
    tl.store(keys + new, new_key, mask=placed)
    tl.store(values + new, new_value, mask=placed)
    logit = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale
    if SCORED:
        tl.store(logits + g * room + slot, logit, mask=g < tl.where(mine, GROUP, 0))
    highest = tl.where(mine, logit, float("-inf"))
    total = tl.zeros([GROUP_PAD], tl.float32) + tl.where(mine, 1.0, 0.0)
    got = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    got += tl.where(mine, new_value.to(tl.float32), 0.0)[None, :]

    for first in tl.range(begin, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        live = (n < end) & (n != slot)
        there = n[:, None].to(tl.int64) * DIM + d[None, :]
        loaded = live[:, None] & dims[None, :]
        k = tl.load(keys + there, mask=loaded, other=0.0, eviction_policy=EVICTION)
        tile = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        tile = tl.where(live[None, :], tile, float("-inf"))
        if SCORED:
            tl.store(
                logits + g[:, None] * room + n[None, :],
                tile,
                mask=heads[:, None] & live[None, :],
            )
        # Never -inf: there is a live slot in the tile, or the new token.
        higher = tl.maximum(highest, tl.max(tile, axis=1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(tile - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(values + there, mask=loaded, other=0.0, eviction_policy=EVICTION)
        got = tl.dot(weights.to(v.dtype), v, got * shrink[:, None], input_precision="ieee")
        highest = higher

    divisor = tl.where(total > 0.0, total, 1.0)
    return got / divisor[:, None], highest + tl.log2(divisor)


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
