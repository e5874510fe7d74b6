"""A decode step's attention in one pass over the slots of a layer.

Owns `decode_attention` (an `passes.DecodePass` in one layer, which also chooses the slots of the
next step's tokens), `Workspace` (its scratch memory) and `plan_slots` (the first choice for a row).
Needs Triton (extra `gpu`). Knows nothing of models or requests.

A step reads each key and value in use once: 2 D x itemsize bytes per slot. In addition it reads and
writes the score and reads the position, 12 bytes per slot, and it writes and reads 4 bytes of
logits per slot and query head.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
import triton
from torch import Tensor

from a2sf.cache import kernels
from a2sf.cache.kernels import decode_programs
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.slots import Slots

TILE_BYTES = 32 * 1024
"""Size of a tile of keys and values. With the two tiles that the compiler prefetches, two programs
fit into the shared memory of a Hopper multiprocessor."""

SCORE_BLOCK = 512
"""Slots per block of the score update."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""Lower limit, if a row's slots can be split so far. With one program, the memory would be idle
while the program computes."""

MOST_SPLITS = 32
"""Most splits of a row's slots; the `close` program holds one result per split in registers."""

LEAST_DOT = 16
"""Rows, columns and depth of the smallest tensor core product."""

NUM_WARPS = 4
"""Warps per program."""

NUM_STAGES = 3
"""Pipeline stages: one tile is computed while two are loaded."""


def tile_slots(head_dim: int, dtype: torch.dtype) -> int:
    """Return the number of slots per tile: a power of two from 16 to 128."""
    slot_bytes = 2 * triton.next_power_of_2(head_dim) * dtype.itemsize
    fits = max(TILE_BYTES // slot_bytes, 1)
    power: int = 1 << (fits.bit_length() - 1)
    return min(max(power, LEAST_DOT), 128)


def choose_splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Return the number of programs that share the slots of a row and KV head.

    The fewest that keep every multiprocessor busy (one if there are enough rows and heads), but at
    most one per tile.

    Args:
        programs: rows x KV heads.
        tiles: number of tiles of a row's slots.
        multiprocessors: number of multiprocessors of the device.
    """
    wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / programs)
    each = math.ceil(tiles / min(wanted, tiles, MOST_SPLITS))
    return math.ceil(tiles / each)


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of a decode step; its content does not matter between steps.

    It stays allocated, because captured graphs need fixed addresses. All layers share it, so that
    the logits stay in the device's L2 cache.
    """

    splits: int
    """Number of programs that share the slots of a row and KV head."""
    logits: Tensor
    """[rows, H_q, slots of the widest head] float32, in base 2."""
    lse: Tensor
    """[rows, H_q] float32: log2 of the softmax's normalisers."""
    split_lse: Tensor
    """[rows, H_q, splits] float32: log2 of each split's normaliser; empty for one split."""
    split_output: Tensor
    """[rows, H_q, splits, D] float32: each split's attention output; empty for one split."""

    @classmethod
    def empty(cls, slots: Slots, num_attention_heads: int, splits: int | None = None) -> Self:
        """Allocate the memory for decoding `slots`; `splits` None chooses by the device."""
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
        # Triton's interpreter runs one program at a time.
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def plan_slots(slots: Slots, policy: PolicyTensors, start: Tensor) -> Tensor:
    """Choose the slots of the tokens at `start`, as `DecodePass` does.

    Needed once per row, when it starts to decode or has moved; after that, `decode_attention`
    updates the plan.

    Args:
        slots, policy: the rows and their policies, in the same layers.
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
    """Run one token per row through one layer: place, attend, accumulate, plan the next eviction.

    Writes the token's key, value, position and score into its slot, updates the scores of the
    layer, and replaces the layer's plan by the one for the tokens at `start + 1`. There is no
    device sync and no allocation except the output, so a graph can capture it. `start` and the
    policy's tensors are read on the device.

    Args:
        query: [rows, H_q, 1, D] in the cache's dtype, rotated; its last dimension contiguous.
        keys, values: [rows, H_kv, 1, D], likewise.
        slots: the rows, as for `DecodePass`: the first min(start, budget) slots of each head hold
            its tokens. The slots of a row and head are contiguous.
        layer: the index of the layer within the slots.
        policy: the rows' policies in the same layers. `any_scored` selects the program, so a
            captured graph is valid for one value of it.
        start: [rows] int64, the position of each row's new token.
        plan: [layers, rows, H_kv] int64, the slots of the new tokens, from `plan_slots` or the
            previous step; each must be below the layer's width, also in padding rows.
        scale: factor on the logits.
        workspace: made for these slots, or for more rows or wider slots.

    Returns:
        The attention output, [rows, H_q, 1, D] in the query's dtype.
    """
    rows, q_heads, _, dim = query.shape
    stored_keys, stored_values = slots.keys[layer], slots.values[layer]
    kv_heads = keys.shape[1]
    assert query.dtype in kernels.DTYPES
    assert dim <= kernels.LARGEST_HEAD_DIM
    score, position, locations = slots.score, slots.position, slots.head_locations
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
    assert stored_keys.stride()[1:] == (dim, 1), "slots of a row must be contiguous"
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
        "SCORE_BLOCK": SCORE_BLOCK,
        "SPLITS": splits,
        "SCORED": policy.any_scored,
        "num_warps": NUM_WARPS,
        # Scores must round like the reference: after the decay, and after the sum.
        "enable_fp_fusion": False,
    }
    # Triton launches on the current device, not on the tensors' device; -1 is the processor.
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
            locations.vectors[layer],
            locations.marks[layer],
            locations.width[layer],
            locations.order[layer],
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
                locations.marks[layer],
                locations.width[layer],
                locations.order[layer],
                room,
                score.stride(0),
                SPLITS_PAD=triton.next_power_of_2(splits),
                **common,
            )
    return output
