"""numba kernels of the law for processors: one row and KV head at a time, token after token.

Owns the update of one head's slots by new tokens: the victim, the new key and value, attention over
the slots in use, and the scores. `walk` calls it. Knows only the addresses in the records of
`walk_records`.

All compiled code must be in this file, in `walk_records` or in `native.memory`. numba's cache
notices changes only in the file of the cached function; `walk` names the other two for the key.
"""

# numba infers types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numpy as np
from numba import carray, float32, int32, njit, uint32

from a2sf.cache.kernels.walk_records import CALL, HEAD
from a2sf.native.memory import (
    SUMS,
    add,
    bits_to_float,
    bytes_at,
    floats_at,
    halves_at,
    integers_at,
    longs_at,
    memory_at,
    store,
    widen,
)

_NEVER = np.int32(2**31 - 1)


@njit
def _mix(value):
    """As `scoring._mix`. Without the casts numba would widen to 64 bits."""
    value = uint32((value ^ (value >> uint32(16))) * uint32(0x7FEB352D))
    value = uint32((value ^ (value >> uint32(15))) * uint32(0x846CA68B))
    return uint32(value ^ (value >> uint32(16)))


@njit
def random_score(seed, head, position):
    """As `scoring.random_scores`, for one token; `head` is the model-wide head number."""
    mixed = _mix(uint32(uint32(seed) ^ _mix(uint32(head + 1))))
    mixed = _mix(uint32(mixed ^ uint32(position)))
    return float32(mixed >> uint32(8)) / float32(16777216.0)


@njit
def exponential(x):
    """e^x in float32 for x <= 0, NaN for NaN: 2^n e^r with |r| <= ln(2) / 2, as in Cephes' expf.

    LLVM vectorises a loop over this function, but not over a call to the C library.
    """
    lowest = float32(-87.0)
    clamped = x if x > lowest else lowest
    n = int32(clamped * float32(1.44269504) - float32(0.5))
    whole = float32(n)
    # ln(2) as a sum of two constants; the product of n and the first is exact.
    r = (x - whole * float32(0.693359375)) + whole * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    e = (p * (r * r) + r + float32(1.0)) * bits_to_float(uint32(n + int32(127)) << uint32(23))
    return float32(0.0) if x < lowest else e


@njit
def _ordered(bits):
    """Map a float's bits to an integer with the same order; self-inverse."""
    return int32(bits ^ ((bits >> int32(31)) & _NEVER))


@njit
def _unless(excluded, value):
    """Return `value` (not negative), or the largest int32 if `excluded`.

    Has no branch, so that LLVM vectorises the loops below.
    """
    return int32(value | (int32(-int32(excluded)) & _NEVER))


@njit
def _victim(score_bits, position, in_use, low, high):
    """The slot with the lowest (score, position) among positions low <= position < high.

    Scores are not negative, so their bits have the same order.
    """
    least = _NEVER
    for s in range(in_use):
        p = position[s]
        least = min(least, _unless((p < low) | (p >= high), score_bits[s]))
    oldest = _NEVER
    for s in range(in_use):
        p = position[s]
        oldest = min(oldest, _unless((score_bits[s] != least) | (p < low) | (p >= high), p))
    for s in range(in_use):
        if position[s] == oldest:
            return s
    return 0


@njit(fastmath=SUMS)
def _logits(query, group, dim, keys, in_use, logits, room):
    """Write query [group, dim] times keys [in_use, dim] to logits [group, room]."""
    whole = in_use & ~3
    for s in range(0, whole, 4):
        k0 = s * dim
        k1, k2, k3 = k0 + dim, k0 + 2 * dim, k0 + 3 * dim
        for g in range(group):
            q = g * dim
            t0 = t1 = t2 = t3 = float32(0.0)
            for d in range(dim):
                x = query[q + d]
                t0 += x * widen(keys[k0 + d])
                t1 += x * widen(keys[k1 + d])
                t2 += x * widen(keys[k2 + d])
                t3 += x * widen(keys[k3 + d])
            at = g * room + s
            logits[at] = t0
            logits[at + 1] = t1
            logits[at + 2] = t2
            logits[at + 3] = t3
    for s in range(whole, in_use):
        for g in range(group):
            total = float32(0.0)
            for d in range(dim):
                total += query[g * dim + d] * widen(keys[s * dim + d])
            logits[g * room + s] = total


@njit(fastmath=SUMS)
def _exponentials(logits, bits, first, in_use):
    """Replace logits by e^(logit - highest); returns their sum."""
    top = int32(-(2**31))
    for s in range(first, first + in_use):
        mine = _ordered(bits[s])
        top = mine if mine > top else top
    highest = bits_to_float(uint32(_ordered(top)))
    total = float32(0.0)
    for s in range(first, first + in_use):
        e = exponential(logits[s] - highest)
        logits[s] = e
        total += e
    return total


@njit(fastmath=SUMS)
def _weighted(weights, group, room, dim, values, in_use, total):
    """Write weights [group, room] times values [in_use, dim] to total [group, dim]."""
    for i in range(group * dim):
        total[i] = float32(0.0)
    whole = in_use & ~7
    for s in range(0, whole, 8):
        for g in range(group):
            at = g * room + s
            p0, p1, p2, p3 = weights[at], weights[at + 1], weights[at + 2], weights[at + 3]
            p4, p5, p6, p7 = weights[at + 4], weights[at + 5], weights[at + 6], weights[at + 7]
            to = g * dim
            for d in range(dim):
                v = s * dim + d
                total[to + d] += (
                    p0 * widen(values[v])
                    + p1 * widen(values[v + dim])
                    + p2 * widen(values[v + 2 * dim])
                    + p3 * widen(values[v + 3 * dim])
                    + p4 * widen(values[v + 4 * dim])
                    + p5 * widen(values[v + 5 * dim])
                    + p6 * widen(values[v + 6 * dim])
                    + p7 * widen(values[v + 7 * dim])
                )
    for s in range(whole, in_use):
        for g in range(group):
            p = weights[g * room + s]
            for d in range(dim):
                total[g * dim + d] += p * widen(values[s * dim + d])


@njit
def _accumulate(score, in_use, weights, group, room, shares, alpha):
    """Decay the scores and add the group's attention weights; `shares` [group] normalise `weights`.

    Rounds like the reference: after the decay, and after the sum over the group.
    """
    for s in range(in_use):
        weights[s] = weights[s] * shares[0]
    for g in range(1, group):
        share, at = shares[g], g * room
        for s in range(in_use):
            weights[s] += weights[at + s] * share
    # `scoring.accumulate`
    for s in range(in_use):
        score[s] = score[s] * alpha + weights[s]


@njit
def _tokens(call, head, pair, query, keys, values, output, stored_keys, stored_values, scratch):
    """Run the tokens of one row and KV head through a layer.

    Vectors are float32, or bfloat16 as bits; `scratch` is an address.
    """
    dim, group, room = call.dim, call.group, call.room
    score = floats_at(call.score + 4 * head.marks)
    score_bits = integers_at(call.score + 4 * head.marks)
    position = integers_at(call.position + 4 * head.marks)
    weights, weight_bits = floats_at(scratch), integers_at(scratch)
    scaled = floats_at(scratch + 4 * group * room)
    total = floats_at(scratch + 4 * group * (room + dim))
    shares = floats_at(scratch + 4 * group * (room + 2 * dim))
    for t in range(head.tokens):
        at, place = head.start + t, head.first + t
        in_use = min(at + 1, head.budget)
        slot = at
        if at >= head.budget:
            slot = _victim(score_bits, position, in_use, int32(head.sinks), int32(at - head.recent))
        to = slot * dim
        for d in range(dim):
            stored_keys[to + d] = keys[place * call.keys_token + d]
        for d in range(dim):
            stored_values[to + d] = values[place * call.values_token + d]
        for g in range(group):
            q = g * call.query_head + place * call.query_token
            for d in range(dim):
                scaled[g * dim + d] = widen(query[q + d]) * float32(call.scale)
        _logits(scaled, group, dim, stored_keys, in_use, weights, room)
        for g in range(group):
            shares[g] = float32(1.0) / _exponentials(weights, weight_bits, g * room, in_use)
        _weighted(weights, group, room, dim, stored_values, in_use, total)
        for g in range(group):
            o = g * call.output_head + place * call.output_token
            for d in range(dim):
                store(output, o + d, total[g * dim + d] * shares[g])
        position[slot] = int32(at)
        score[slot] = float32(0.0)
        if head.random_seed >= 0:
            score[slot] = random_score(head.random_seed, head.number, at)
        if head.scored:
            _accumulate(score, in_use, weights, group, room, shares, head.alpha)
        if call.retained:
            visible = bytes_at(
                call.retained + (pair * call.retained_side + at) * call.retained_side
            )
            for s in range(call.retained_side):
                visible[s] = 0
            for s in range(in_use):
                visible[position[s]] = 1


@njit
def _work(data, numbers, size):
    """Process heads, one after the other, until none is left; every thread of the team runs this.

    `numbers` turns addresses into pointers; `size` is the size of a number in bytes.
    """
    call = carray(data, 1, CALL)[0]
    heads = carray(memory_at(call.heads), call.pairs, HEAD)
    order, begun = longs_at(call.order), longs_at(call.begun)
    scratch = call.scratch + 4 * call.scratch_size * add(longs_at(call.working), 1)
    turn = add(begun, 1)
    while turn < call.pairs:
        pair = order[turn]
        row, kv_head = pair // call.kv_heads, pair % call.kv_heads
        first_query = kv_head * call.group
        head = heads[pair]
        _tokens(
            call,
            head,
            pair,
            numbers(call.query + size * (row * call.query_row + first_query * call.query_head)),
            numbers(call.keys + size * (row * call.keys_row + kv_head * call.keys_head)),
            numbers(call.values + size * (row * call.values_row + kv_head * call.values_head)),
            numbers(call.output + size * (row * call.output_row + first_query * call.output_head)),
            numbers(call.stored_keys + size * head.vectors),
            numbers(call.stored_values + size * head.vectors),
            scratch,
        )
        turn = add(begun, 1)


def walk_float32(data):
    """Run tokens through a layer in float32; `data` is the address of a CALL."""
    _work(data, floats_at, 4)


def walk_bfloat16(data):
    """Run tokens through a layer in bfloat16; `data` is the address of a CALL."""
    _work(data, halves_at, 2)
