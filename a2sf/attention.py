"""Attention over slots: the output and what each token was paid, in one call.

Owns `attend` and what carries out the block law in a layer: `block` for any number of tokens a row,
`end_prompt` for the trim after the last block, `decode` for one token. Knows nothing of models: a
layer hands in projected, rotated queries, keys and values, and gets the attention output back.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from a2sf import scoring
from a2sf.cache import LayerSlots, PolicyTensors
from a2sf.scoring import EMPTY

QUERY_TILE = 256
"""Queries attended at a time, so that a long block needs tile x slots logits, not block x slots."""


def attend(
    query: Tensor,
    query_position: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    weights: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the stored tokens at or before each query.

    Each query's row is normalised before anything is summed; a KV head's group of query heads is
    summed, never averaged. Softmax runs in float32, or in float64 for float64 models.

    Args:
        query: [rows, H_q, width, D].
        query_position: [rows, width] integer; each must reach at least one stored token.
        keys, values: [rows, H_kv, slots, D].
        position: [rows, H_kv, slots] int32, `EMPTY` where no token is.
        weights: [rows, H_kv, width] float32, how much each query counts in `mass`.
        scale: factor on the logits.

    Returns:
        The output [rows, H_q, width, D] in the query's dtype, and the attention mass
        [rows, H_kv, slots] float32: the weighted sum over queries and group.
    """
    rows, q_heads, width, dim = query.shape
    kv_heads, slots = keys.shape[1:3]
    group = q_heads // kv_heads
    grouped = query.view(rows, kv_heads, group, width, dim)
    precision = torch.promote_types(query.dtype, torch.float32)
    mass = torch.zeros(rows, kv_heads, slots, dtype=torch.float32, device=query.device)
    outputs = []
    for first in range(0, width, QUERY_TILE):
        tile = slice(first, first + QUERY_TILE)
        q = grouped[:, :, :, tile]
        tokens = q.shape[3]
        logits = q.reshape(rows, kv_heads, group * tokens, dim) @ keys.transpose(2, 3)
        logits = logits.view(rows, kv_heads, group, tokens, slots) * scale
        unseen = position[:, :, None, :] > query_position[:, None, tile, None]
        logits = logits.masked_fill(unseen[:, :, None], -math.inf)
        probabilities = torch.softmax(logits, dim=-1, dtype=precision)
        mass += (weights[:, :, None, tile] @ probabilities.float().sum(dim=2)).squeeze(2)
        probabilities = probabilities.to(values.dtype).view(rows, kv_heads, group * tokens, slots)
        outputs.append((probabilities @ values).view(rows, kv_heads, group, tokens, dim))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    return output.reshape(rows, q_heads, width, dim), mass


@dataclass(frozen=True)
class Block:
    """What one forward pass does to a batch of rows, the same in every layer."""

    start: Tensor
    """[rows] int64: the position of each row's first new token; the true count of tokens seen."""
    lengths: Tensor
    """[rows] int64: how many new tokens are real; 0 leaves the row as it is."""
    used: Tensor
    """[rows] int64: slots in use before the pass."""
    policy: PolicyTensors

    @property
    def excess(self) -> Tensor:
        """[rows] int64: tokens to evict first, so that at most budget - 1 are stored."""
        over = (self.used - (self.policy.budget - 1)).clamp(min=0)
        return torch.where(self.lengths > 0, over, 0)

    @property
    def used_after(self) -> Tensor:
        """[rows] int64: slots in use after the pass."""
        return self.used - self.excess + self.lengths


def block(
    slots: LayerSlots,
    layer: int,
    step: Block,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """Carry out the block law in one layer: trim, place, attend, accumulate.

    Args:
        slots: the layer's slots; used - excess + width must fit in them for every row.
        layer: the layer's index, which picks its alphas.
        step: the pass.
        query: [rows, H_q, width, D], right-padded beyond each row's length.
        keys, values: [rows, H_kv, width, D], likewise.
        scale: factor on the logits.

    Returns:
        The attention output, [rows, H_q, width, D]; padding's is meaningless.
    """
    width = query.shape[2]
    policy = step.policy
    alpha = policy.alpha[:, layer]
    slots.trim(step.excess, step.start, policy.sinks, policy.recent)
    offsets = torch.arange(width, device=query.device)
    query_position = step.start[:, None] + offsets
    position = query_position.masked_fill(offsets >= step.lengths[:, None], EMPTY)
    at = (step.used - step.excess)[:, None] + offsets
    placed = at[:, None].expand(-1, keys.shape[1], -1)
    slots.write(placed, keys, values, position)
    weights = scoring.query_weights(alpha, step.lengths, width)
    output, mass = attend(
        query, query_position, slots.keys, slots.values, slots.position, weights, scale
    )
    accumulated = scoring.accumulate(slots.score, mass, alpha, step.lengths)
    if policy.any_random:
        accumulated = _keep_random(slots.score, accumulated, policy, layer, placed, query_position)
    slots.score.copy_(accumulated)
    return output


def end_prompt(slots: LayerSlots, used: Tensor, length: Tensor, policy: PolicyTensors) -> Tensor:
    """Trim one layer to the budget after the last block of a prompt, as the law says.

    Args:
        slots: the layer's slots.
        used: [rows] int64, slots in use.
        length: [rows] int64, the prompts' tokens.
        policy: the rows' policies.

    Returns:
        [rows] int64: slots in use afterwards.
    """
    excess = (used - policy.budget).clamp(min=0)
    slots.trim(excess, length, policy.sinks, policy.recent)
    return used - excess


def decode(
    slots: LayerSlots,
    layer: int,
    step: Block,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    """Carry out the block law for one token a row: the new token takes the victim's slot.

    Arguments as for `block` with width 1 and every length 1. Equal to it but for slot order.
    """
    policy = step.policy
    alpha = policy.alpha[:, layer]
    full = step.used >= policy.budget
    victim = slots.victim(step.start, policy.sinks, policy.recent)
    placed = torch.where(full[:, None], victim, step.used[:, None])[..., None]
    position = step.start[:, None]
    slots.write(placed, keys, values, position)
    weights = torch.ones(*alpha.shape, 1, dtype=torch.float32, device=query.device)
    output, mass = attend(query, position, slots.keys, slots.values, slots.position, weights, scale)
    accumulated = scoring.accumulate(slots.score, mass, alpha, step.lengths)
    if policy.any_random:
        accumulated = _keep_random(slots.score, accumulated, policy, layer, placed, position)
    slots.score.copy_(accumulated)
    return output


def _keep_random(
    before: Tensor,
    accumulated: Tensor,
    policy: PolicyTensors,
    layer: int,
    placed: Tensor,
    positions: Tensor,
) -> Tensor:
    """Give rows of the random baseline their old scores back, and new tokens their hash.

    Args:
        before, accumulated: [rows, H_kv, slots] float32, the scores without and with accumulation.
        policy: the rows' policies.
        layer: the layer's index.
        placed: [rows, H_kv, width] int64, the slots that the new tokens were written to.
        positions: [rows, width] integer, the new tokens' positions.
    """
    seed = policy.random_seed.clamp(min=0)
    hashes = scoring.random_scores(seed, layer, positions[:, None, :].expand_as(placed))
    fixed = before.scatter(2, placed, hashes)
    return torch.where((policy.random_seed >= 0)[:, None, None], fixed, accumulated)
