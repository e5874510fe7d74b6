"""The Triton program that runs many tokens through one layer, one after the other.

Owns the loop over the tokens of a row and KV head. Each token uses the functions of a decode step:
`slot_attention.attend_slots`, then `score_update.update_scores`. Knows only the strides and tables
of the tensors; `triton_walk` launches it.

A program reads keys, values, scores and positions that its own threads wrote for the previous
token. Two barriers per token order these accesses. No other program uses the same head.
"""

# Triton infers types; compile-time constants are capitalised.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import triton
import triton.language as tl

from a2sf.cache.kernels.score_update import fresh_score, lowest, next_slot, update_scores
from a2sf.cache.kernels.slot_attention import attend_slots

# Tables have any alignment, and texts any length: one program must work for all.
_ANYWHERE = (
    *("order", "vectors", "marks", "width", "start", "end", "alpha", "budget", "recent", "sinks"),
    *("random_seed", "first_head", "score", "position", "visible"),
)
_ANY_VALUE = ("room", "side")


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANYWHERE)
def walk(
    query,
    new_keys,
    new_values,
    output,
    keys,
    values,
    score,
    position,
    logits,
    lse,
    visible,
    order,
    vectors,
    marks,
    width,
    start,
    end,
    alpha,
    budget,
    recent,
    sinks,
    random_seed,
    first_head,
    scale,
    room,
    side,
    query_row,
    query_head,
    query_token,
    new_keys_row,
    new_keys_head,
    new_keys_token,
    new_values_row,
    new_values_head,
    new_values_token,
    output_row,
    output_head,
    output_token,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORE_BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
    RECORDED: tl.constexpr,
):
    """Run the tokens start .. end - 1 of a row through the slots of one KV head.

    Tables have one entry per row and KV head, [pairs]; `start`, `end` and `random_seed` have one
    per row. `order` maps programs to pairs. `scale` includes the factor log2(e). If `RECORDED`,
    element [pair, i, p] of `visible` [pairs, side, side] uint8 becomes 1 if query i could attend to
    the token at position p, else 0.
    """
    pair = tl.load(order + tl.program_id(0))
    row = pair // KV_HEADS
    head = pair % KV_HEADS
    slab = tl.load(vectors + pair) * DIM
    keys += slab
    values += slab
    scores = score + tl.load(marks + pair)
    positions = position + tl.load(marks + pair)
    logits += pair * GROUP * room
    lse += pair * GROUP
    slots = tl.load(width + pair).to(tl.int32)
    most = tl.load(budget + pair).to(tl.int32)
    begin = tl.load(start + row).to(tl.int32)
    tokens = tl.load(end + row).to(tl.int32) - begin

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    heads = g < GROUP
    dims = d < DIM
    both = heads[:, None] & dims[None, :]
    queries = query + row * query_row + (head * GROUP + g)[:, None] * query_head + d[None, :]
    outputs = output + row * output_row + (head * GROUP + g)[:, None] * output_head + d[None, :]
    new_keys += row * new_keys_row + head * new_keys_head
    new_values += row * new_values_row + head * new_values_head

    in_use = tl.minimum(tl.minimum(begin, most), slots)
    victim = lowest(
        scores,
        positions,
        in_use,
        tl.load(sinks + pair),
        begin - tl.load(recent + pair),
        SCORE_BLOCK,
    )
    slot = next_slot(victim, begin, most, slots)
    for t in tl.range(0, tokens):
        at = begin + t
        # 64 bits: a batch of texts may have more than 2^31 elements.
        token = at.to(tl.int64)
        in_use = tl.minimum(tl.minimum(at + 1, most), slots)
        q = tl.load(queries + token * query_token, mask=both, other=0.0)
        new_key = tl.load(new_keys + token * new_keys_token + d, mask=dims, other=0.0)
        new_value = tl.load(new_values + token * new_values_token + d, mask=dims, other=0.0)
        got, normaliser = attend_slots(
            q,
            new_key,
            new_value,
            keys,
            values,
            logits,
            slot,
            0,
            in_use,
            room,
            scale,
            room,
            GROUP,
            GROUP_PAD,
            DIM,
            DIM_PAD,
            BLOCK,
            SCORED,
            # No eviction hint: the next token reads keys and values again.
            "",
        )
        tl.store(outputs + token * output_token, got, mask=both)
        tl.store(lse + g, normaliser, mask=heads)
        # Other threads load the logits next, and the new key and value with the next token.
        tl.debug_barrier()
        # Loaded again for each token, so that they take no registers during attention.
        seed = tl.load(random_seed + row)
        victim = update_scores(
            logits,
            lse,
            scores,
            positions,
            slot,
            token,
            in_use,
            tl.load(alpha + pair).to(tl.float32),
            fresh_score(seed, tl.load(first_head) + head, token),
            tl.where(seed >= 0, 0.0, 1.0),
            tl.load(sinks + pair),
            token + 1 - tl.load(recent + pair),
            room,
            GROUP,
            SCORE_BLOCK,
            SCORED,
        )
        slot = next_slot(victim, at + 1, most, slots)
        # Other threads load the new position, and overwrite the logits.
        tl.debug_barrier()
        if RECORDED:
            given = visible + (pair * side + at) * side
            for i in tl.range(0, side, SCORE_BLOCK):
                n = i + tl.arange(0, SCORE_BLOCK)
                tl.store(given + n, tl.zeros([SCORE_BLOCK], tl.uint8), mask=n < side)
            # Other threads overwrite these zeros.
            tl.debug_barrier()
            for i in tl.range(0, in_use, SCORE_BLOCK):
                n = i + tl.arange(0, SCORE_BLOCK)
                live = n < in_use
                where = tl.load(positions + n, mask=live, other=0)
                tl.store(given + where, tl.full([SCORE_BLOCK], 1, tl.uint8), mask=live)
