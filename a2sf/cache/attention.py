"""Attention from the queries of a block to the stored tokens, and the sums of its weights.

Owns `attend` (the output of the queries), `attention_sum` (the sum of their attention weights) and
`BlockAttention`, the protocol of an implementation that computes both; `attend_and_score` is the
one in plain torch. Pure functions on tensors. Knows nothing of policies, evictions or models.
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERY_TILE = 256
"""Queries per call of attention, so that the mask takes tile x slots and not block x slots."""

SCORE_TILE = 32
"""Queries scored at a time. Their attention rows are stored, and should fit the CPU's caches."""


def attend(
    query: Tensor,
    query_position: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """Attend from each query to the stored tokens at or before its position.

    Args:
        query: [rows, H_q, width, D].
        query_position: [rows, width] integer; each must reach at least one stored token.
        keys, values: [rows, H_kv, slots, D].
        position: [rows, H_kv, slots] int32, `EMPTY` in slots without a token.
        scale: factor on the logits.

    Returns:
        The output [rows, H_q, width, D] in the query's dtype.
    """
    rows, q_heads, width, dim = query.shape
    kv_heads, slots = position.shape[1:]
    group = q_heads // kv_heads
    # Each KV head of a row is a separate batch entry, because heads hold different tokens. `expand`
    # shares its keys and values with the group's query heads without a copy.
    grouped = query.reshape(rows * kv_heads, group, width, dim)
    shared = (rows * kv_heads, group, slots, dim)
    k = keys.reshape(rows * kv_heads, 1, slots, dim).expand(shared)
    v = values.reshape(rows * kv_heads, 1, slots, dim).expand(shared)
    outputs = []
    for first in range(0, width, QUERY_TILE):
        tile = slice(first, first + QUERY_TILE)
        visible = position[:, :, None, :] <= query_position[:, None, tile, None]
        outputs.append(
            scaled_dot_product_attention(
                grouped[:, :, tile],
                k,
                v,
                attn_mask=visible.view(rows * kv_heads, 1, -1, slots),
                scale=scale,
            )
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.view(rows, q_heads, width, dim)


def attend_causally(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend causally along whole texts, without eviction.

    Args:
        query: [rows, H_q, width, D]; padded at the right, where no real token attends to it.
        keys, values: [rows, H_kv, width, D], likewise.
        scale: factor on the logits.

    Returns:
        The output [rows, H_q, width, D] in the query's dtype.
    """
    return scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=scale, enable_gqa=True
    )


def attention_sum(
    query: Tensor,
    query_position: Tensor,
    keys: Tensor,
    position: Tensor,
    weights: Tensor,
    scale: float,
) -> Tensor:
    """Sum the attention weights that each stored token receives from the queries.

    Each query's row is normalised before the sum. The query heads of a group are summed, not
    averaged. Softmax runs in float32, or in float64 for float64 models.

    Args:
        query, query_position, keys, position, scale: as for `attend`.
        weights: [rows, H_kv, width] float32, the factor of each query in the sum.

    Returns:
        [rows, H_kv, slots] float32: the weighted sum over queries and group.
    """
    rows, q_heads, width, dim = query.shape
    kv_heads, slots = position.shape[1:]
    group = q_heads // kv_heads
    grouped = query.view(rows, kv_heads, group, width, dim)
    transposed = keys.transpose(2, 3)
    precision = torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros(rows, kv_heads, slots, dtype=torch.float32, device=query.device)
    for first in range(0, width, SCORE_TILE):
        tile = slice(first, first + SCORE_TILE)
        q = (grouped[:, :, :, tile] * scale).reshape(rows, kv_heads, -1, dim)
        unseen = position[:, :, None, :] > query_position[:, None, tile, None]
        logits = (q @ transposed).view(rows, kv_heads, group, -1, slots)
        logits = logits.masked_fill_(unseen[:, :, None], -math.inf)
        probabilities = torch.softmax(logits, dim=-1, dtype=precision).float().sum(dim=2)
        total += (weights[:, :, None, tile] @ probabilities).squeeze(2)
    return total


class BlockAttention(Protocol):
    """Computes attention and scores of a block in one layer."""

    def __call__(
        self,
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
        """Attend, and sum the attention weights of the last queries.

        Args:
            query, query_position, keys, values, position, scale: as for `attend`.
            weights: [rows, H_kv, counted] float32, the factors of the last `counted` queries in the
                sum; earlier queries are not summed.
            in_order: whether slot i of each row holds position i or padding, and the last slot
                holds the last query's token. Then a plain causal mask is enough.

        Returns:
            The output [rows, H_q, width, D] in the query's dtype, and [rows, H_kv, slots] float32
            as from `attention_sum`, or None if `counted` is 0.
        """
        ...


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
    """The `BlockAttention` in plain torch."""
    output = attend(query, query_position, keys, values, position, scale)
    counted = weights.shape[2]
    if not counted:
        return output, None
    query, query_position = query[:, :, -counted:], query_position[:, -counted:]
    return output, attention_sum(query, query_position, keys, position, weights, scale)
