"""What a prompt's queries pay to each stored token, without writing their attention out.

Owns `mass`, the same function as `attention.mass`, for devices that Triton compiles for; the extra
`gpu` brings Triton. Knows nothing of the block law: the queries' weights say who counts.
"""

import math

import torch
import triton
from torch import Tensor

from a2sf.kernels import prefill_programs
from a2sf.kernels.decode import LEAST_DOT, NUM_WARPS, refuse_unsupported

TILE_ELEMENTS = 8192
"""Of a tile of keys: 64 slots of a head of 128."""

QUERIES = 64
"""Queries multiplied at a time: the rows of Hopper's own matrix instruction."""

NUM_STAGES = 2
"""Tiles in flight: one is worked on while the next is loaded."""


def tile_slots(head_dim: int) -> int:
    """Return how many slots a program works on at a time: a power of two from 32 to 128."""
    padded: int = triton.next_power_of_2(head_dim)
    return min(TILE_ELEMENTS // max(padded, LEAST_DOT), 128)


def mass(
    query: Tensor,
    query_position: Tensor,
    keys: Tensor,
    position: Tensor,
    weights: Tensor,
    scale: float,
) -> Tensor:
    """Sum what the queries pay to each stored token, in float32.

    A query of weight w adds w x softmax: `exp(qk - (LSE_q - ln w))`. Time goes with the slots times
    the queries that count in each KV head, so that decay makes long blocks cheap. Nothing is asked
    of the device.

    Args:
        query: [rows, H_q, width, D], its last dimension contiguous.
        query_position: [rows, width] int64, consecutive in each row.
        keys: [rows, H_kv, slots, D] in the query's dtype; slots of a head one after the other.
        position: [rows, H_kv, slots] int32, `EMPTY` where no token is.
        weights: [rows, H_kv, width] float32, how much each query counts, as
            `scoring.query_weights` gives them: 0 or more, and from the first that counts on, all of
            a row's own tokens count.
        scale: factor on the logits.

    Returns:
        [rows, H_kv, slots] float32: the weighted sum over queries and group.

    Raises:
        Unsupported: the dtype or the head size is one that there is no program for.
    """
    rows, q_heads, width, dim = query.shape
    kv_heads, slots = position.shape[1:]
    refuse_unsupported(query.dtype, dim)
    assert keys.dtype == query.dtype
    assert query.stride(3) == 1
    assert keys.stride()[2:] == (dim, 1), "slots of a head lie one after the other"
    assert position.stride(2) == 1
    weights, query_position = weights.contiguous(), query_position.contiguous()
    counted = weights > 0
    first_counted = torch.where(counted.any(dim=-1), counted.int().argmax(dim=-1), width)
    normalisers = torch.empty(rows, q_heads, width, dtype=torch.float32, device=query.device)
    paid = torch.empty(rows, kv_heads, slots, dtype=torch.float32, device=query.device)
    tile = tile_slots(dim)
    sizes = (scale * math.log2(math.e), width, slots)
    strides = (*query.stride()[:3], *keys.stride()[:2], *position.stride()[:2])
    common = {
        "KV_HEADS": kv_heads,
        "GROUP": q_heads // kv_heads,
        "DIM": dim,
        "DIM_PAD": max(triton.next_power_of_2(dim), LEAST_DOT),
        "QUERIES": QUERIES,
        "SLOTS": tile,
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
        "enable_fp_fusion": False,
    }
    # Triton launches on the current device, whichever the tensors are on; -1 is the processor.
    with torch.cuda.device(query.get_device()):
        prefill_programs.normalise[rows * q_heads, triton.cdiv(width, QUERIES)](
            query,
            query_position,
            keys,
            position,
            weights,
            normalisers,
            *sizes,
            *strides,
            **common,
        )
        prefill_programs.charge[rows * kv_heads, triton.cdiv(slots, tile)](
            query,
            query_position,
            keys,
            position,
            normalisers,
            first_counted,
            paid,
            *sizes,
            *strides,
            **common,
        )
    return paid
