"""Device code that attends from one new token to the slots of a row and KV head.

Owns the attention of a decode step: it writes the new token's key and value to its slot, and runs
the softmax over the slots in tiles. Decoding and walks along texts share it. Knows nothing of
scores, policies, or the layout of rows.
"""

# Triton infers types; compile-time constants are capitalised.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl


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
