"""The law of forgetting, as pure functions on tensors.

Owns the decay and accumulation of scores, which tokens may be evicted, and in which order. Knows
nothing of the layout of slots or of attention. Faster implementations (numba, Triton) are tested
against these functions, and these against a reference in the tests, written out token by token.

Source: A2SF, arXiv 2407.20485, `A <- alpha * A + S[n]`, with a factor for each layer and KV head.
"""

import torch
from torch import Tensor

WEIGHT_CUTOFF = 1e-6
"""Queries with a smaller weight in a block's score are dropped, here and in every fast path.

So the score of a block depends on its last ln(1e-6) / ln(alpha) queries: 132 at alpha .9, 1,375 at
.99. alpha = 1 keeps every query.
"""

EMPTY = 2**31 - 1
"""The position of an empty slot. It is above every query's position, so it is always masked."""


def query_weights(alpha: Tensor, lengths: Tensor, first: int, width: int) -> Tensor:
    """Return the weights of queries in their block's score: `alpha^(c-1-j)`, with `0^0 = 1`.

    Args:
        alpha: [layers, rows, H_kv] float64.
        lengths: [rows] integer, the block's tokens (c).
        first, width: the queries j = first .. first + width - 1.

    Returns:
        [layers, rows, H_kv, width] float32; 0 beyond a block's tokens and below `WEIGHT_CUTOFF`.
    """
    age = lengths[:, None] - 1 - first - torch.arange(width, device=alpha.device)
    weights = alpha[..., None] ** age.clamp(min=0)[:, None, :]
    counts = (age >= 0)[:, None, :] & (weights >= WEIGHT_CUTOFF)
    return torch.where(counts, weights, 0.0).float()


def decay(alpha: Tensor, lengths: Tensor) -> Tensor:
    """Return the factor of a block on the earlier scores: `alpha^c`.

    Args:
        alpha: [layers, rows, H_kv] float64.
        lengths: [rows] integer, the block's tokens (c).

    Returns:
        [layers, rows, H_kv, 1] float32.
    """
    return (alpha ** lengths[:, None]).float()[..., None]


def accumulate(score: Tensor, decay: Tensor | float, attention_sum: Tensor | float) -> None:
    """Apply the law to one layer's scores, in place: `A <- alpha^c * A + S`.

    The numba and Triton kernels repeat this line, with the same rounding: first the product, then
    the sum.

    Args:
        score: [rows, H_kv, slots] float32; the block's own tokens start at 0.
        decay: one layer of the result of `decay`, [rows, H_kv, 1] float32. 1 for the later pieces
            of a block.
        attention_sum: [rows, H_kv, slots] float32, the attention weights summed over the block's
            queries, each times its weight. 0 if no query has a weight.
    """
    score.mul_(decay).add_(attention_sum)


def evictable(position: Tensor, start: Tensor, sinks: Tensor, recent: Tensor) -> Tensor:
    """Mark the slots that a trim before position `start` may evict.

    Args:
        position: [layers, rows, H_kv, slots] int32, `EMPTY` where there is no token.
        start: [rows] integer, the position of the next token to be placed.
        sinks: [rows] integer, the first positions, never evicted.
        recent: [layers, rows, H_kv] integer, the last positions before `start`, never evicted.

    Returns:
        [layers, rows, H_kv, slots] bool.
    """
    # In the dtype of `position`: a comparison of different dtypes would convert all of it first.
    first = sinks.to(position.dtype)[:, None, None]
    end = (start[:, None] - recent).to(position.dtype)[..., None]
    return (position >= first) & (position < end)


def eviction_key(score: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
    """Return sort keys for eviction: the slot with the smallest key is evicted first.

    The bits of non-negative floats sort like the floats. So one integer with the score's bits above
    the position gives the order (score, then position), without ties. Slots that are not `allowed`
    get the largest key. Protection is a mask; scores do not change.

    Args:
        score: [layers, rows, H_kv, slots] float32, not negative.
        position: [layers, rows, H_kv, slots] int32.
        allowed: [layers, rows, H_kv, slots] bool.

    Returns:
        [layers, rows, H_kv, slots] int64.
    """
    bits = score.contiguous().view(torch.int32).to(torch.int64)
    return torch.where(allowed, (bits << 32) | position, torch.iinfo(torch.int64).max)


def first_heads(layers: Tensor, head: int = 0) -> Tensor:
    """Return a model-wide number for one head of each layer, for `random_scores`.

    `layers` [layers] int64 are the layers' indices. `head` is the head's index in its layer; it is
    above 0 if other processes hold the heads before it. Returns [layers] int64.
    """
    return (layers << 16) + head


def random_scores(seed: Tensor, first: Tensor, kv_heads: int, position: Tensor) -> Tensor:
    """Return the scores of the `random` baseline: a hash of (seed, layer, head, position).

    Args:
        seed: [rows] int64, from 0 to 2^31 - 1.
        first: [layers] int64, the number of each layer's first head, from `first_heads`.
        kv_heads: heads a layer (H_kv).
        position: [rows, tokens] integer.

    Returns:
        [layers, rows, H_kv, tokens] float32 in [0, 1).
    """
    heads = torch.arange(kv_heads, device=position.device) + first[:, None] + 1
    mixed = _mix(seed[:, None] ^ _mix(heads)[:, None, :])
    mixed = _mix(mixed[..., None] ^ position.to(torch.int64)[:, None, :])
    return (mixed >> 8).float() / 2**24


def _mix(value: Tensor) -> Tensor:
    """Mix 32 bits held in int64, by xor-shifts and odd multipliers, as in 32-bit hashes."""
    mask = 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & mask
    value = ((value ^ (value >> 15)) * 0x846CA68B) & mask
    return value ^ (value >> 16)
