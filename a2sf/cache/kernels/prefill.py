"""Attention and scores of a prompt's blocks in one layer, on GPUs.

Owns `attend_and_score`, an `attention.BlockAttention` with flash attention for tokens in order,
and `attention_sum`, the same function as in `attention` without storing attention rows. Needs
Triton (extra `gpu`). Knows nothing of the block law: the caller passes the weights of the queries.
"""

import math

import torch
import triton
from torch import Tensor

from a2sf.cache import kernels
from a2sf.cache.attention import attend
from a2sf.cache.kernels import prefill_programs
from a2sf.cache.kernels.decode import LEAST_DOT, NUM_WARPS

TILE_ELEMENTS = 8192
"""Elements of a tile of keys: 64 slots at head_dim 128."""

QUERIES = 64
"""Queries per tile: the rows of Hopper's matrix instruction."""

NUM_STAGES = 2
"""Pipeline stages: one tile is computed while the next is loaded."""


def tile_slots(head_dim: int) -> int:
    """Return the number of slots per tile: a power of two from 32 to 128."""
    padded: int = triton.next_power_of_2(head_dim)
    return min(TILE_ELEMENTS // max(padded, LEAST_DOT), 128)


def attend_and_score(
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
    """An `attention.BlockAttention` that does not store attention rows."""
    lse = None
    if in_order and flash_serves(query):
        output, lse = flash(query, keys, values, scale)
    else:
        output = attend(query, query_position, keys, values, position, scale)
    counted = weights.shape[2]
    if not counted:
        return output, None
    return output, attention_sum(
        query[:, :, -counted:],
        query_position[:, -counted:],
        keys,
        position,
        weights,
        scale,
        None if lse is None else lse[:, :, -counted:],
    )


def flash_serves(query: Tensor) -> bool:
    """Whether torch's flash attention supports these queries, [rows, H_q, width, D]."""
    return query.is_cuda and query.dtype.itemsize == 2 and query.shape[3] % 8 == 0


def flash(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend causally to tokens in order; the last slot holds the last query's token.

    Args:
        query: [rows, H_q, width, D], for which `flash_serves` is true.
        keys, values: [rows, H_kv, slots, D], slots >= width.
        scale: factor on the logits.

    Returns:
        The output [rows, H_q, width, D] in the query's dtype, and [rows, H_q, width] float32, the
        natural logarithms of the softmax's normalisers.
    """
    # `scaled_dot_product_attention` calls this operation, but does not return the normalisers. Its
    # causal mask is aligned with the last slot, and it supports grouped heads.
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, dropout_p=0.0, is_causal=True, scale=scale
    )
    return output, lse


def attention_sum(
    query: Tensor,
    query_position: Tensor,
    keys: Tensor,
    position: Tensor,
    weights: Tensor,
    scale: float,
    lse: Tensor | None = None,
) -> Tensor:
    """Sum the attention weights that each stored token receives from the queries, in float32.

    A query of weight w adds w x softmax: `exp(qk - (LSE_q - ln w))`. The time is proportional to
    slots x queries with a weight above 0 in each KV head, so decay makes long blocks cheap. There
    is no device sync.

    Args:
        query: [rows, H_q, width, D], its last dimension contiguous.
        query_position: [rows, width] int64, consecutive in each row.
        keys: [rows, H_kv, slots, D] in the query's dtype; the slots of a head are contiguous.
        position: [rows, H_kv, slots] int32, `EMPTY` in slots without a token.
        weights: [rows, H_kv, width] float32, from `scoring.query_weights`: not negative, and after
            the first weight above 0, the weights of all the row's own tokens are above 0.
        scale: factor on the logits.
        lse: [rows, H_q, width] float32, the natural logarithms of the softmax's normalisers. None:
            compute them, which takes as long as the sums.

    Returns:
        [rows, H_kv, slots] float32: the weighted sum over queries and group.
    """
    rows, q_heads, width, dim = query.shape
    kv_heads, slots = position.shape[1:]
    assert query.dtype in kernels.DTYPES
    assert dim <= kernels.LARGEST_HEAD_DIM
    assert keys.dtype == query.dtype
    assert query.stride(3) == 1
    assert keys.stride()[2:] == (dim, 1), "slots of a head must be contiguous"
    assert position.stride(2) == 1
    weights, query_position = weights.contiguous(), query_position.contiguous()
    counted = weights > 0
    first_counted = torch.where(counted.any(dim=-1), counted.int().argmax(dim=-1), width)
    if lse is None:
        normalisers = torch.empty(rows, q_heads, width, dtype=torch.float32, device=query.device)
    else:
        each = weights.log2().repeat_interleave(q_heads // kv_heads, dim=1)
        normalisers = (lse * math.log2(math.e) - each).contiguous()
    sums = torch.empty(rows, kv_heads, slots, dtype=torch.float32, device=query.device)
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
    # Triton launches on the current device, not on the tensors' device; -1 is the processor.
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
        prefill_programs.sum_attention[rows * kv_heads, triton.cdiv(slots, tile)](
            query,
            query_position,
            keys,
            position,
            normalisers,
            first_counted,
            sums,
            *sizes,
            *strides,
            **common,
        )
    return sums
