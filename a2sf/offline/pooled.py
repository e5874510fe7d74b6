"""Splits a layer's slots among its heads by the scores of the prompt, after prefill.

Owns AdaKV's rule (arXiv 2407.11550): the highest scores over all heads of a layer win the slots,
and each head has a guaranteed minimum. Used only in teacher forcing, as a baseline: the shape of
the engine's rows is fixed before a prompt is known. Knows nothing of how scores are computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2sf.cache.policy_tensors import PolicyTensors
from a2sf.cache.scoring import EMPTY
from a2sf.cache.slots import Slots


def pooled_budgets(
    slots: Slots, length: Tensor, policy: PolicyTensors, floors: Sequence[float | None]
) -> Tensor:
    """Split the slots of a layer's heads again, by the scores of the prompt.

    Every head keeps the slots for its sinks, its recent window and the next token. The other slots
    of all heads form a pool. A head's win is the number of its tokens among the pool-size highest
    scores of all heads (ties: the newest token of the first head). A head receives (1 - floor) x
    its win + floor x its pooled slots under the policy. Rounding the running total gives whole
    numbers with an unchanged sum.

    Args:
        slots: one layer with the retained tokens of the prompts and their scores; all heads have
            the same number of slots.
        length: [rows] int64, tokens of the prompts.
        policy: the rows' policies in that layer.
        floors: [rows] between 0 and 1; None for a row that must not change. A row whose prompt has
            no more tokens to choose from than the pool has slots does not change either.

    Returns:
        [1, rows, H_kv] int64, number of slots.
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
        # A head that has evicted during the prompt cannot grow: the next token must replace one of
        # its tokens.
        lost = (position != EMPTY).sum(dim=-1) < end
        competes[lost, lowest[row, lost]] = False
        # One more for the next token.
        reserved = sinks + recent + 1
        free = own - reserved
        pool = int(free.sum())
        scores = slots.whole.score[0, row].masked_fill(~competes, -torch.inf).flatten()
        if int(competes.sum()) <= pool:
            continue
        # On a tie within a head the later position wins, because the law evicts the oldest first.
        order = torch.argsort(position.flatten(), descending=True, stable=True)
        ranked = order[torch.argsort(scores[order], descending=True, stable=True)][:pool]
        heads = torch.arange(len(own), device=own.device).repeat_interleave(position.shape[1])
        won = torch.bincount(heads[ranked], minlength=len(own))
        wanted = (1 - floor) * won.double() + floor * free.double()
        totals = torch.floor(wanted.cumsum(0) + 0.5).long()
        totals[-1] = pool
        pooled = totals.diff(prepend=totals.new_zeros(1))
        budgets[0, row] = reserved + pooled
    return budgets
