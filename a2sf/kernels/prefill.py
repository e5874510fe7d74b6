"""A prompt's blocks in one layer: what their queries get, and what they pay to each stored token.

Owns `attend_and_charge`, an `attention.BlockAttention` for devices that Triton compiles for: flash
attention where tokens lie in order, and `mass`, the same function as `attention.mass` without its
rows of attention. The extra `gpu` brings Triton. Knows nothing of the block law: the queries'
weights say who counts.
"""

import math

import torch
import triton
from torch import Tensor

from a2sf import kernels
from a2sf.attention import attend
from a2sf.kernels import prefill_programs
from a2sf.kernels.decode import LEAST_DOT, NUM_WARPS

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


def attend_and_charge(
    query: Tensor,
    query_position: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    weights: Tensor,
    scale: float,
    /,
    *,
    in_order: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend and sum without rows of attention; an `attention.BlockAttention`."""
    lse = None
    if in_order and flash_serves(query):
        output, lse = flash(query, keys, values, scale)
    else:
        output = attend(query, query_position, keys, values, position, scale)
    counted = weights.shape[2]
    if not counted:
        return output, None
    return output, mass(
        query[:, :, -counted:],
        query_position[:, -counted:],
        keys,
        position,
        weights,
        scale,
        None if lse is None else lse[:, :, -counted:],
    )


def flash_serves(query: Tensor) -> bool:
    """Whether torch has flash attention for such queries, [rows, H_q, width, D]."""
    return query.is_cuda and query.dtype.itemsize == 2 and query.shape[3] % 8 == 0


def flash(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend causally to tokens that lie in order, the last query's own in the last slot.

    Args:
        query: [rows, H_q, width, D], for which flash attention `flash_serves`.
        keys, values: [rows, H_kv, slots, D], slots >= width.
        scale: factor on the logits.

    Returns:
        The output [rows, H_q, width, D] in the query's dtype, and [rows, H_q, width] float32, the
        natural logarithms of the softmax's normalisers.
    """
    # What `scaled_dot_product_attention` calls, which keeps the normalisers to itself. Its causal
    # mask is aligned with the last slot, and it shares keys among a group of heads.
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, dropout_p=0.0, is_causal=True, scale=scale
    )
    return output, lse


def mass(
    query: Tensor,
    query_position: Tensor,
    keys: Tensor,
    position: Tensor,
    weights: Tensor,
    scale: float,
    lse: Tensor | None = None,
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
        lse: [rows, H_q, width] float32, the natural logarithms of the softmax's normalisers; None
            where they are to be found, which takes as long as the sums.

    Returns:
        [rows, H_kv, slots] float32: the weighted sum over queries and group.
    """
    rows, q_heads, width, dim = query.shape
    kv_heads, slots = position.shape[1:]
    assert query.dtype in kernels.DTYPES
    assert dim <= kernels.LARGEST_HEAD_DIM
    assert keys.dtype == query.dtype
    assert query.stride(3) == 1
    assert keys.stride()[2:] == (dim, 1), "slots of a head lie one after the other"
    assert position.stride(2) == 1
    weights, query_position = weights.contiguous(), query_position.contiguous()
    counted = weights > 0
    first_counted = torch.where(counted.any(dim=-1), counted.int().argmax(dim=-1), width)
    if lse is None:
        normalisers = torch.empty(rows, q_heads, width, dtype=torch.float32, device=query.device)
    else:
        each = weights.log2().repeat_interleave(q_heads // kv_heads, dim=1)
        normalisers = (lse * math.log2(math.e) - each).contiguous()
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
        if lse is None:
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
