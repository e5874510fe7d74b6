"""Dealing a layer's slots among its heads by a prompt's own scores, once the prompt has been read.

Owns AdaKV's rule (arXiv 2407.11550): the highest scores of all heads of a layer win its slots, and
each head is sure of a part of what it would have alone. For teacher forcing, to compare with: the
engine's rows are shaped before a prompt is known. Knows nothing of how scores come about.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2sf.cache import PolicyTensors, Slots
from a2sf.scoring import EMPTY


def pooled_budgets(
    slots: Slots, length: Tensor, policy: PolicyTensors, floors: Sequence[float | None]
) -> Tensor:
    """Deal anew what a layer's heads have together.

    Sinks and the recent window are every head's own. Of the other slots, as many as all heads have
    together go to the highest scores among all heads' tokens (of equal ones, to the newest of the
    first head). So many slots count as 1 - floor, and what a head has under its policy as floor.
    Whole numbers come from rounding the running total, so that the sum stays what it was.

    Args:
        slots: one layer with what is left of the prompts, scored; all heads have the same slots.
        length: [rows] int64, the prompts' tokens.
        policy: the rows' policies in that layer.
        floors: [rows] between 0 and 1; None leaves a row as it is, and so does a prompt that has
            fewer tokens to choose among than slots.

    Returns:
        [1, rows, H_kv] int64 slots.
    """
    budgets = policy.budget.clone()
    lowest = slots.whole.victim(length, policy)[0]
    for row, floor in enumerate(floors):
        if floor is None:
            continue
        own, recent = policy.budget[0, row], policy.recent[0, row]
        sinks, end = policy.sinks[row], length[row]
        position = slots.whole.position[0, row]
        competes = (position != EMPTY) & (position >= sinks) & (position < (end - recent)[:, None])
        # A head that has evicted along the prompt cannot hold more than it does: the slot of the
        # token that is being placed must be one of those.
        lost = (position != EMPTY).sum(dim=-1) < end
        competes[lost, lowest[row, lost]] = False
        # One more for the token that is being placed.
        reserved = sinks + recent + 1
        free = own - reserved
        pool = int(free.sum())
        scores = slots.whole.score[0, row].masked_fill(~competes, -torch.inf).flatten()
        if int(competes.sum()) <= pool:
            continue
        # Later positions win a tie within a head, as the law evicts the oldest first.
        order = torch.argsort(position.flatten(), descending=True, stable=True)
        ranked = order[torch.argsort(scores[order], descending=True, stable=True)][:pool]
        heads = torch.arange(len(own), device=own.device).repeat_interleave(position.shape[1])
        won = torch.bincount(heads[ranked], minlength=len(own))
        wanted = (1 - floor) * won.double() + floor * free.double()
        totals = torch.floor(wanted.cumsum(0) + 0.5).long()
        totals[-1] = pool
        dealt = totals.diff(prepend=totals.new_zeros(1))
        budgets[0, row] = reserved + dealt
    return budgets
