"""The block law for one forward pass: evictions, placements, attention and scores.

Owns `BlockPass` for the blocks of prompts, `DecodePass` for one token per row, and `end_prompt`
between them. A pass first chooses the slots of the new tokens in all layers. Then each layer passes
in its projected, rotated queries, keys and values and receives the attention output. Knows nothing
of models.
"""

import math

import torch
from torch import Tensor

from a2sf.cache import scoring
from a2sf.cache.attention import BlockAttention, attend_and_score
from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.scoring import EMPTY
from a2sf.cache.slots import Rectangle, Slots


class BlockPass:
    """Runs a block of tokens per row, or a piece of a block, through the layers of a cache.

    A block may be cut into pieces of any width that run one after the other. The cut is scheduling:
    it does not change the result.
    """

    def __init__(
        self,
        slots: Slots,
        policy: PolicyTensors,
        *,
        start: Tensor,
        lengths: Tensor,
        used: Tensor,
        width: int,
        first: int = 0,
        in_order: bool = False,
        attention: BlockAttention = attend_and_score,
    ) -> None:
        """Trim at the start of a block, then place the new tokens.

        Args:
            slots: the rows; all heads have the same number of slots. Each head needs `width` empty
                slots beside the tokens that it keeps.
            policy: the rows' policies in the same layers.
            start: [rows] int64, the position of each block's first token.
            lengths: [rows] int64, tokens of each block; a row with length 0 does not change.
            used: [layers, rows, H_kv] int64, tokens stored before this pass.
            width: tokens of this pass; tokens beyond a row's length are padding.
            first: tokens of the block that earlier pieces have processed.
            in_order: True if nothing was evicted and this pass evicts nothing, and the rows are
                exactly as wide as the tokens that they hold after this pass, padding included.
            attention: computes attention and scores in each layer.
        """
        mine = self._slots = slots.whole
        self._in_order = in_order
        self._attention = attention
        # Scores decay once per block, with its first piece.
        self._decay = None if first else scoring.decay(policy.alpha, lengths)
        if first == 0:
            num_to_evict = (used - (policy.budget - 1)).clamp(min=0)
            num_to_evict = torch.where(lengths[:, None] > 0, num_to_evict, 0)
            mine.evict(num_to_evict, start, policy)
            used = used - num_to_evict
        self.used_after = used + (lengths - first).clamp(0, width)[:, None]
        """[layers, rows, H_kv] int64: tokens stored after this pass."""
        offsets = first + torch.arange(width, device=start.device)
        self._position = start[:, None] + offsets
        padded = self._position.masked_fill(offsets >= lengths[:, None], EMPTY)
        if in_order:
            # The slots that `free` would find.
            shape = (*mine.position.shape[:3], width)
            self._placed = self._position[None, :, None].expand(shape)
        else:
            self._placed = mine.free(width)
        mine.place(self._placed, padded, policy)
        weights = scoring.query_weights(policy.alpha, lengths, first, width)
        if policy.any_random:
            weights *= policy.accumulating
        if not policy.any_scored:
            weights.zero_()
        self._weights = weights
        counted = (weights > 0).any(dim=2).any(dim=1)
        # The first query of each layer with a weight above 0: the scores start there.
        self._first_counted = torch.where(counted.any(1), counted.int().argmax(1), width).tolist()

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend and accumulate in one layer.

        Args:
            layer: the index of the layer within the slots.
            query: [rows, H_q, width, D], right-padded beyond each row's length.
            keys, values: [rows, H_kv, width, D], likewise.
            scale: factor on the logits.

        Returns:
            The attention output, [rows, H_q, width, D]; undefined for padding.
        """
        slots = self._slots
        slots.write(layer, self._placed[layer], keys, values)
        output, sums = self._attention(
            query,
            self._position,
            slots.keys[layer],
            slots.values[layer],
            slots.position[layer],
            self._weights[layer, :, :, self._first_counted[layer] :],
            scale,
            in_order=self._in_order,
        )
        decay = 1.0 if self._decay is None else self._decay[layer]
        scoring.accumulate(slots.score[layer], decay, 0.0 if sums is None else sums)
        return output


def end_prompt(slots: Slots, used: Tensor, length: Tensor, policy: PolicyTensors) -> Tensor:
    """Trim to the budget after the last block of a prompt, as the law requires.

    Args:
        slots: the rows; all heads have the same number of slots.
        used: [layers, rows, H_kv] int64, tokens stored.
        length: [rows] int64, the prompts' tokens.
        policy: the rows' policies in the same layers.

    Returns:
        [layers, rows, H_kv] int64: tokens stored afterwards.
    """
    num_to_evict = (used - policy.budget).clamp(min=0)
    slots.whole.evict(num_to_evict, length, policy)
    return used - num_to_evict


class DecodePass:
    """Runs one token per row through the layers of a cache. The token takes the victim's slot.

    Equal to a `BlockPass` of width 1. A head with budget b uses only its first b slots, which fill
    in order.
    """

    def __init__(self, slots: Slots, policy: PolicyTensors, start: Tensor) -> None:
        """Choose the victims and place the new tokens.

        Args:
            slots: the rows. Each head needs as many slots as the largest budget of that head, or as
                the tokens that any row will hold.
            policy: the rows' policies in the same layers.
            start: [rows] int64, the position of each row's new token. A head holds all earlier
                tokens of a row if they are fewer than its budget.
        """
        self._steps: list[list[tuple[slice, _Step, int]]] = [[] for _ in slots.keys]
        """For each layer, in head order: the heads computed together, their `_Step`, and the
        layer's index in that step."""
        for run, part in slots.parts:
            step = _Step(part, policy.part(run), start)
            for index, layer in enumerate(range(run.layers.start, run.layers.stop)):
                self._steps[layer].append((run.heads, step, index))

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend and accumulate in one layer, as `BlockPass` with width 1."""
        steps = self._steps[layer]
        if len(steps) == 1:
            _, step, index = steps[0]
            return step(index, query, keys, values, scale)
        rows, kv_heads, width, dim = keys.shape
        by_head = query.view(rows, kv_heads, -1, width, dim)
        return torch.cat(
            [
                step(
                    index, by_head[:, heads].flatten(1, 2), keys[:, heads], values[:, heads], scale
                )
                for heads, step, index in steps
            ],
            dim=1,
        )


class _Step:
    """A `DecodePass` over heads with the same number of slots."""

    def __init__(self, slots: Rectangle, policy: PolicyTensors, start: Tensor) -> None:
        self._slots = slots
        used = torch.minimum(start[:, None], policy.budget)
        full = used == policy.budget
        victim = slots.victim(start, policy)
        self._placed = torch.where(full, victim, used)[..., None]
        self._scored = policy.any_scored
        self._decay = scoring.decay(policy.alpha, torch.ones_like(start))
        slots.place(self._placed, start[:, None], policy)
        self._accumulating = policy.accumulating if policy.any_random else None
        in_use = torch.minimum(used + 1, policy.budget)
        places = torch.arange(slots.position.shape[-1], device=start.device)
        self._empty = (places >= in_use[..., None])[..., None, :]

    def __call__(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """As `DecodePass`, for these heads. Layer 0 is the first layer of the slots."""
        slots = self._slots
        rows, q_heads, _, dim = query.shape
        kv_heads = keys.shape[1]
        slots.write(layer, self._placed[layer], keys, values)
        stored_keys, stored_values = slots.keys[layer], slots.values[layer]
        grouped = query.view(rows, kv_heads, -1, dim) * scale
        logits = grouped @ stored_keys.transpose(2, 3)
        logits = logits.masked_fill_(self._empty[layer], -math.inf)
        precision = torch.promote_types(query.dtype, torch.float32)
        probabilities = torch.softmax(logits, dim=-1, dtype=precision)
        if self._scored:
            gained = probabilities.float().sum(dim=2)
            if self._accumulating is not None:
                gained = gained * self._accumulating
            scoring.accumulate(slots.score[layer], self._decay[layer], gained)
        output = probabilities.to(values.dtype) @ stored_values
        return output.view(rows, q_heads, 1, dim)
