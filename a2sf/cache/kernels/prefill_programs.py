"""Triton programs for the scores of a prompt's block: attention weights summed over queries.

`normalise` reads the keys once per tile of queries and computes the softmax's normalisers.
`sum_attention` reads the queries with a weight above 0 once per tile of slots and sums their
attention weights. No matrix of queries x slots is stored. Knows nothing of values or of the block
law; `prefill` launches them.
"""

# Triton infers types; compile-time constants are capitalised.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl

# Blocks and rows have any length: one program must work for all.
_ANY_VALUE = ("width", "slots")


@triton.jit(do_not_specialize=_ANY_VALUE)
def normalise(
    query,
    query_position,
    keys,
    position,
    weights,
    normalisers,
    scale,
    width,
    slots,
    query_row,
    query_head,
    query_token,
    keys_row,
    keys_head,
    position_row,
    position_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write log2(sum of exp / weight) for a tile of one head's queries; inf if the weight is 0."""
    q_pair = tl.program_id(0).to(tl.int64)
    pair = q_pair // GROUP
    row = pair // KV_HEADS
    head = pair % KV_HEADS
    j = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, DIM_PAD)
    dims = d < DIM
    real = j < width
    weight = tl.load(weights + pair * width + j, mask=real, other=0.0)
    # Queries with weight 0 attend to nothing, whatever their values.
    at = tl.load(query_position + row * width + j, mask=real & (weight > 0.0), other=-1)
    q = tl.load(
        query
        + row * query_row
        + (q_pair % (KV_HEADS * GROUP)) * query_head
        + j[:, None].to(tl.int64) * query_token
        + d[None, :],
        mask=real[:, None] & dims[None, :],
        other=0.0,
    )
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    end = tl.where(tl.max(weight, axis=0) > 0.0, slots, 0)
    for first in tl.range(0, end, SLOTS):
        n = first + tl.arange(0, SLOTS)
        live = n < slots
        where = tl.load(
            position + row * position_row + head * position_head + n, mask=live, other=0x7FFFFFFF
        )
        k = tl.load(
            keys + row * keys_row + head * keys_head + n[:, None].to(tl.int64) * DIM + d[None, :],
            mask=live[:, None] & dims[None, :],
            other=0.0,
        )
        tile = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        tile = tl.where(where[None, :] <= at[:, None], tile, float("-inf"))
        higher = tl.maximum(highest, tl.max(tile, axis=1))
        # Slots are in no order, so there may be no visible slot so far.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(tile - base[:, None]), axis=1)
        highest = higher
    counts = total > 0.0
    ratio = tl.where(counts, total, 1.0) / tl.where(counts, weight, 1.0)
    tl.store(
        normalisers + q_pair * width + j,
        tl.where(counts, highest + tl.log2(ratio), float("inf")),
        mask=real,
    )


@triton.jit(do_not_specialize=_ANY_VALUE)
def sum_attention(
    query,
    query_position,
    keys,
    position,
    normalisers,
    first_counted,
    sums,
    scale,
    width,
    slots,
    query_row,
    query_head,
    query_token,
    keys_row,
    keys_head,
    position_row,
    position_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write the summed attention weights of a tile of slots: `sums` [pairs, slots] float32."""
    pair = tl.program_id(0).to(tl.int64)
    row = pair // KV_HEADS
    head = pair % KV_HEADS
    n = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    d = tl.arange(0, DIM_PAD)
    dims = d < DIM
    live = n < slots
    where = tl.load(
        position + row * position_row + head * position_head + n, mask=live, other=0x7FFFFFFF
    )
    k = tl.load(
        keys + row * keys_row + head * keys_head + n[:, None].to(tl.int64) * DIM + d[None, :],
        mask=live[:, None] & dims[None, :],
        other=0.0,
    )
    # Queries before the tile's oldest token attend to none of it. Their positions are consecutive.
    oldest = tl.min(where, axis=0) - tl.load(query_position + row * width).to(tl.int32)
    begin = tl.maximum(oldest, tl.load(first_counted + pair).to(tl.int32))
    total = tl.zeros([SLOTS], tl.float32)
    for g in tl.range(0, GROUP):
        q_head = head * GROUP + g
        for first in tl.range(begin, width, QUERIES):
            j = first + tl.arange(0, QUERIES)
            real = j < width
            at = tl.load(query_position + row * width + j, mask=real, other=-1)
            normaliser = tl.load(
                normalisers + (pair * GROUP + g) * width + j, mask=real, other=float("inf")
            )
            q = tl.load(
                query
                + row * query_row
                + q_head * query_head
                + j[:, None].to(tl.int64) * query_token
                + d[None, :],
                mask=real[:, None] & dims[None, :],
                other=0.0,
            )
            tile = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            counts = (where[None, :] <= at[:, None]) & (normaliser < float("inf"))[:, None]
            tile = tl.where(counts, tile - normaliser[:, None], float("-inf"))
            total += tl.sum(tl.exp2(tile), axis=0)
    tl.store(sums + pair * slots + n, total, mask=live)
