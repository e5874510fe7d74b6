"""A decode step's attention in one pass over the slots of a layer.

Owns `decode_attention` (what `attention.DecodePass` does in one layer, and the choice of the slots
that the next step's tokens take), `Workspace` (its scratch memory) and `plan_slots` (the first such
choice of a row). Needs Triton, which the extra `gpu` brings. Knows nothing of models or requests.

A step reads each key and value in use once: 2 D x itemsize bytes a slot. Beside them go the score
(read and written) and the position (read), 12 bytes, and 4 bytes of logits a query head, written
and read back.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
import triton
from torch import Tensor

from a2sf import kernels
from a2sf.cache import PolicyTensors, Slots
from a2sf.kernels import decode_programs

TILE_BYTES = 32 * 1024
"""Keys and values loaded at a time by a program: with the two tiles that the compiler loads ahead,
two programs fit into a Hopper multiprocessor's shared memory."""

SETTLE_BLOCK = 512
"""Slots whose scores are updated at a time."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""At least, as far as a row's slots can be split: one alone would leave the memory idle whenever it
computes."""

MOST_SPLITS = 32
"""Of a row's slots: what the closing program joins, it holds in registers."""

LEAST_DOT = 16
"""Rows, columns and depth of the smallest tensor core product."""

NUM_WARPS = 4
"""That share a program's work."""

NUM_STAGES = 3
"""Tiles in flight: one is worked on while two are loaded."""


def tile_slots(head_dim: int, dtype: torch.dtype) -> int:
    """Return how many slots a program loads at a time: a power of two from 16 to 128."""
    slot_bytes = 2 * triton.next_power_of_2(head_dim) * dtype.itemsize
    fits = max(TILE_BYTES // slot_bytes, 1)
    power: int = 1 << (fits.bit_length() - 1)
    return min(max(power, LEAST_DOT), 128)


def choose_splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Return how many programs should share the slots of a row and KV head.

    As few as keep every multiprocessor busy, and one where rows and heads are enough for that;
    no more than leave each a tile.

    Args:
        programs: rows x KV heads.
        tiles: of a row's slots.
        multiprocessors: of the device.
    """
    wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / programs)
    each = math.ceil(tiles / min(wanted, tiles, MOST_SPLITS))
    return math.ceil(tiles / each)


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of a decode step, shared by its layers: what a step leaves in it is no matter.

    Kept from step to step, so that a captured graph finds it where it was; and shared by the
    layers, so that the logits stay in the device's L2 cache.
    """

    splits: int
    """How many programs share the slots of a row and KV head."""
    logits: Tensor
    """[rows, H_q, slots of the widest head] float32, in base 2."""
    lse: Tensor
    """[rows, H_q] float32: the logarithms, in base 2, of the softmax's normalisers."""
    split_lse: Tensor
    """[rows, H_q, splits] float32, the same of each split; empty where there is one."""
    split_output: Tensor
    """[rows, H_q, splits, D] float32: each split's attention; empty where there is one."""

    @classmethod
    def empty(cls, slots: Slots, num_attention_heads: int, splits: int | None = None) -> Self:
        """Allocate what decoding `slots` needs; `splits` None chooses by the device."""
        rows, kv_heads = len(slots.position), len(slots.layout.slots[0])
        dim, device, widest = slots.keys[0].shape[2], slots.score.device, slots.layout.widest
        tiles = triton.cdiv(widest, tile_slots(dim, slots.keys[0].dtype))
        if splits is None:
            splits = choose_splits(rows * kv_heads, tiles, _multiprocessors(device))

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        kept = splits if splits > 1 else 0
        return cls(
            splits=splits,
            logits=floats(rows, num_attention_heads, widest),
            lse=floats(rows, num_attention_heads),
            split_lse=floats(rows, num_attention_heads, kept),
            split_output=floats(rows, num_attention_heads, kept, dim),
        )


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        # The interpreter runs one program after the other.
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def plan_slots(slots: Slots, policy: PolicyTensors, start: Tensor) -> Tensor:
    """Choose the slots that tokens placed at `start` take, as `DecodePass` does.

    Needed once for a row, when it begins to decode or its slots were moved; from then on
    `decode_attention` keeps the plan.

    Args:
        slots, policy: the rows and their policies, of the same layers.
        start: [rows] int64, the position of each row's next token.

    Returns:
        [layers, rows, H_kv] int64.
    """
    victim = slots.victim(start, policy)
    return torch.where(start[:, None] >= policy.budget, victim, start[:, None])


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    slots: Slots,
    layer: int,
    policy: PolicyTensors,
    start: Tensor,
    plan: Tensor,
    scale: float,
    workspace: Workspace,
) -> Tensor:
    """Carry one token a row through one layer: place, attend, accumulate, plan the next eviction.

    Writes the token's key, value, position and score into its slot, updates the scores of the
    layer, and replaces the layer's plan by that for the tokens at `start + 1`. Nothing is asked of
    the device and nothing allocated but the output, so that a graph may capture it; `start` and the
    policy's tensors are read on the device.

    Args:
        query: [rows, H_q, 1, D] in the cache's dtype, rotated; its last dimension contiguous.
        keys, values: [rows, H_kv, 1, D], likewise.
        slots: the rows, as for `DecodePass`: the first min(start, budget) slots of each head hold
            its tokens. Slots of a row and head lie one after the other.
        layer: the layer, counted from the first of the slots'.
        policy: the rows' policies in the same layers. `any_scored` decides which program runs, so
            that a captured graph serves one value of it.
        start: [rows] int64, the position of each row's new token.
        plan: [layers, rows, H_kv] int64, the slots that the new tokens take, from `plan_slots` or
            the step before; each below the layer's width, also in rows that merely pad a batch.
        scale: factor on the logits.
        workspace: made for these slots, or for more rows or wider ones.

    Returns:
        The attention output, [rows, H_q, 1, D] in the query's dtype.
    """
    rows, q_heads, _, dim = query.shape
    stored_keys, stored_values = slots.keys[layer], slots.values[layer]
    kv_heads = keys.shape[1]
    assert query.dtype in kernels.DTYPES
    assert dim <= kernels.LARGEST_HEAD_DIM
    score, position, places = slots.score, slots.position, slots.places
    tables = (
        plan[layer],
        start,
        policy.alpha[layer],
        policy.budget[layer],
        policy.recent[layer],
        policy.sinks,
        policy.random_seed,
        policy.first_heads[layer],
    )
    assert stored_keys.dtype == keys.dtype == values.dtype == query.dtype
    assert query.stride(3) == keys.stride(3) == values.stride(3) == 1
    assert stored_keys.stride() == stored_values.stride()
    assert stored_keys.stride()[1:] == (dim, 1), "slots of a row lie one after the other"
    assert score.stride() == position.stride()
    assert score.stride(1) == 1
    assert all(table.is_contiguous() for table in tables)
    room = workspace.logits.shape[2]
    assert room >= max(slots.layout.slots[layer])
    assert len(workspace.lse) >= rows

    output = torch.empty(rows, q_heads, 1, dim, dtype=query.dtype, device=query.device)
    splits = workspace.splits
    block = tile_slots(dim, query.dtype)
    common = {
        "KV_HEADS": kv_heads,
        "GROUP": q_heads // kv_heads,
        "DIM": dim,
        "DIM_PAD": max(triton.next_power_of_2(dim), LEAST_DOT),
        "SETTLE_BLOCK": SETTLE_BLOCK,
        "SPLITS": splits,
        "SCORED": policy.any_scored,
        "num_warps": NUM_WARPS,
        # Scores round as the reference's do: after the decay, and after the sum.
        "enable_fp_fusion": False,
    }
    # Triton launches on the current device, whichever the tensors are on; -1 is the processor.
    with torch.cuda.device(query.get_device()):
        decode_programs.attend[rows * kv_heads, splits](
            query,
            keys,
            values,
            stored_keys,
            stored_values,
            output if splits == 1 else workspace.split_output,
            workspace.lse if splits == 1 else workspace.split_lse,
            workspace.logits,
            score,
            position,
            *tables,
            places.vectors[layer],
            places.marks[layer],
            places.width[layer],
            places.order[layer],
            scale * math.log2(math.e),
            room,
            *query.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            stored_keys.stride(0),
            score.stride(0),
            GROUP_PAD=max(triton.next_power_of_2(q_heads // kv_heads), LEAST_DOT),
            BLOCK=block,
            num_stages=NUM_STAGES,
            **common,
        )
        if splits > 1:
            decode_programs.close[rows * kv_heads,](
                workspace.split_output,
                workspace.split_lse,
                output,
                workspace.lse,
                workspace.logits,
                score,
                position,
                *tables,
                places.marks[layer],
                places.width[layer],
                places.order[layer],
                room,
                score.stride(0),
                SPLITS_PAD=triton.next_power_of_2(splits),
                **common,
            )
    return output
