"""Device code that updates the scores after one token in one layer, and finds the next victim.

Owns the functions of `scoring` for the slots of a row and KV head, given logits and normalisers.
Knows nothing of keys, values or queries.
"""

# Triton infers types; compile-time constants are capitalised.
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
    """As `scoring.random_scores`, for one token; `head` is the model-wide head number."""
    mixed = _mix(seed ^ _mix(head + 1))
    return (_mix(mixed ^ position) >> 8).to(tl.float32) / 16777216.0


@triton.jit
def slots_in_use(start, budget, row, pair, width):
    """Number of slots in use after the new token is placed; at most `width`."""
    in_use = tl.minimum(tl.load(start + row) + 1, tl.load(budget + pair))
    return tl.minimum(in_use, width).to(tl.int32)


@triton.jit
def next_slot(victim, at, budget, width):
    """The slot of the token at position `at`; always below `width`."""
    following = tl.minimum(at, width - 1).to(tl.int32)
    return tl.where(at >= budget, victim, following)


@triton.jit
def fresh_score(seed, head, at):
    """The initial score of a token; `head` is the model-wide head number."""
    return tl.where(seed >= 0, _random_score(seed, head, at), 0.0)


@triton.jit
def _lower(best, place, score, where, allowed, n):
    """Keep the lower of two candidates per element, in the order of `scoring.eviction_key`."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.where(allowed, (bits << 32) | where, 0x7FFFFFFFFFFFFFFF)
    lower = key < best
    return tl.where(lower, key, best), tl.where(lower, n, place)


@triton.jit
def _slot_of(best, place):
    """The slot of the smallest key."""
    # Positions are distinct, so there is a tie only if no slot is evictable.
    least = tl.min(best, axis=0)
    return tl.min(tl.where(best == least, place, 0x7FFFFFFF), axis=0)


@triton.jit
def lowest(scores, positions, in_use, first_open, end_open, BLOCK: tl.constexpr):
    """The slot of the lowest (score, position) with first_open <= position < end_open.

    `scores` and `positions` point to a head's slots; the first `in_use` slots hold tokens. If no
    slot is in the range, the result is any of these slots.
    """
    best = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    place = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, in_use, BLOCK):
        n = first + tl.arange(0, BLOCK)
        live = n < in_use
        now = tl.load(scores + n, mask=live, other=0.0)
        where = tl.load(positions + n, mask=live, other=0).to(tl.int64)
        open_ = live & (where >= first_open) & (where < end_open)
        best, place = _lower(best, place, now, where, open_, n)
    return _slot_of(best, place)


@triton.jit
def update_scores(
    logits,
    lse,
    scores,
    positions,
    slot,
    at,
    in_use,
    factor,
    fresh,
    counted,
    first_open,
    end_open,
    room,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
):
    """Place the token at position `at` in `slot`, update a head's scores, return the next victim.

    Tensors are those of the head: `logits` [GROUP, room] and `lse` [GROUP], both in base 2,
    `scores` and `positions` [in_use or more]. Scores are multiplied by `factor`; the score of the
    new token is `fresh`. Then `counted` (0 or 1) x the attention weights is added.
    """
    best = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
    place = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, in_use, BLOCK):
        n = first + tl.arange(0, BLOCK)
        live = n < in_use
        is_new = n == slot
        now = tl.load(scores + n, mask=live, other=0.0)
        if SCORED:
            attention_sum = tl.zeros([BLOCK], tl.float32)
            for g in tl.static_range(GROUP):
                logit = tl.load(logits + g * room + n, mask=live, other=float("-inf"))
                attention_sum += tl.exp2(logit - tl.load(lse + g))
            # `scoring.accumulate`
            now = tl.where(is_new, fresh, now * factor) + attention_sum * counted
            tl.store(scores + n, now, mask=live)
        else:
            now = tl.where(is_new, fresh, now)
        where = tl.where(is_new, at, tl.load(positions + n, mask=live, other=0).to(tl.int64))
        open_ = live & (where >= first_open) & (where < end_open)
        best, place = _lower(best, place, now, where, open_, n)

    tl.store(positions + slot, at.to(tl.int32))
    if not SCORED:
        tl.store(scores + slot, fresh)
    return _slot_of(best, place)


@triton.jit
def finish_step(
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
    mark,
    width,
    room,
    score_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
):
    """End a decode step of a row and KV head: call `update_scores` and write the next plan.

    Needs `logits` [pairs, GROUP, room] and `lse` [pairs, GROUP], both in base 2. `mark` is the
    index of the head's first slot in a row of scores, `width` its number of slots.
    """
    pair = row * KV_HEADS + head
    at = tl.load(start + row)
    seed = tl.load(random_seed + row)
    marks = row * score_row + mark
    victim = update_scores(
        logits + pair * GROUP * room,
        lse + pair * GROUP,
        score + marks,
        position + marks,
        tl.load(plan + pair).to(tl.int32),
        at,
        slots_in_use(start, budget, row, pair, width),
        tl.load(alpha + pair).to(tl.float32),
        fresh_score(seed, tl.load(first_head) + head, at),
        tl.where(seed >= 0, 0.0, 1.0),
        tl.load(sinks + row),
        at + 1 - tl.load(recent + pair),
        room,
        GROUP,
        BLOCK,
        SCORED,
    )
    tl.store(plan + pair, next_slot(victim, at + 1, tl.load(budget + pair), width).to(tl.int64))
