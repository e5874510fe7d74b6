"""The scores of one decode step in one layer, and who is evicted next, on the device.

Owns what `scoring` does for the tokens of a row and KV head once the softmax is known. Knows
nothing of keys, values or queries.
"""

# Triton types its own; what it takes as constants at compile time is capitalised.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def _mix(value):
    """As `scoring._mix`."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)


@triton.jit
def _random_score(seed, head, position):
    """As `scoring.random_scores`, of one token; `head` is counted over the whole model."""
    mixed = _mix(seed ^ _mix(head + 1))
    return (_mix(mixed ^ position) >> 8).to(tl.float32) / 16777216.0


@triton.jit
def slots_in_use(start, budget, row, width):
    """Slots in use once the new token is placed; never beyond the layer's, whatever is asked."""
    held = tl.minimum(tl.load(start + row) + 1, tl.load(budget + row))
    return tl.minimum(held, width).to(tl.int32)


@triton.jit
def settle(
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
    pair,
    width,
    room,
    score_row,
    score_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
):
    """Place the new token, update the scores of a row and KV head, choose the next slot.

    Needs `logits` [pairs, GROUP, room] and `lse` [pairs, GROUP], both in base 2.
    """
    row = pair // KV_HEADS
    head = pair % KV_HEADS
    at = tl.load(start + row)
    held = slots_in_use(start, budget, row, width)
    slot = tl.load(plan + pair)
    factor = tl.load(alpha + pair).to(tl.float32)
    first_open = tl.load(sinks + row)
    end_open = at + 1 - tl.load(recent + row)
    seed = tl.load(random_seed + row)
    hashed = _random_score(seed, tl.load(first_head) + head, at)
    fresh = tl.where(seed >= 0, hashed, 0.0)
    counted = tl.where(seed >= 0, 0.0, 1.0)
    scores = score + row * score_row + head * score_head
    positions = position + row * score_row + head * score_head

    never = 0x7FFFFFFFFFFFFFFF
    best = tl.full([BLOCK], never, tl.int64)
    place = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, held, BLOCK):
        n = first + tl.arange(0, BLOCK)
        live = n < held
        is_new = n == slot
        now = tl.load(scores + n, mask=live, other=0.0)
        if SCORED:
            mass = tl.zeros([BLOCK], tl.float32)
            for g in tl.static_range(GROUP):
                query_head = pair * GROUP + g
                logit = tl.load(logits + query_head * room + n, mask=live, other=float("-inf"))
                mass += tl.exp2(logit - tl.load(lse + query_head))
            now = tl.where(is_new, fresh, now * factor) + mass * counted
            tl.store(scores + n, now, mask=live)
        else:
            now = tl.where(is_new, fresh, now)
        where = tl.where(is_new, at, tl.load(positions + n, mask=live, other=0).to(tl.int64))
        open_ = live & (where >= first_open) & (where < end_open)
        # The order of `scoring.eviction_key`.
        bits = now.to(tl.int32, bitcast=True).to(tl.int64)
        key = tl.where(open_, (bits << 32) | where, never)
        lower = key < best
        best = tl.where(lower, key, best)
        place = tl.where(lower, n, place)

    tl.store(positions + slot, at.to(tl.int32))
    if not SCORED:
        tl.store(scores + slot, fresh)
    # No two tokens share a position, so that only where nothing is open the least is not alone.
    least = tl.min(best, axis=0)
    victim = tl.min(tl.where(best == least, place, width), axis=0)
    following = tl.minimum(at + 1, width - 1)
    tl.store(plan + pair, tl.where(at + 1 >= tl.load(budget + row), victim, following))
