"""The filters of sampling, as functions on the scores of many rows.

Owns the repetition penalty, top_k, top_p and min_p. Each function works along the vocabulary, so a
row's result depends only on that row. Knows nothing of requests or draws.
"""

import torch
from torch import Tensor


def penalize_repetition(scores: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Divide the positive and multiply the negative `scores` [rows, vocab] of `seen` tokens.

    `penalty` is [rows, 1], `seen` [rows, vocab] bool; each token counts once, as in transformers.
    """
    penalty = penalty.to(scores.dtype)
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalized, scores)


def keep_top_k(scaled: Tensor, top_k: Tensor) -> Tensor:
    """Set all but the `top_k` [rows, 1] largest of `scaled` [rows, vocab] to minus infinity.

    All tokens tied with the k-th largest stay, as in transformers.
    """
    top_k = top_k.clamp(max=scaled.shape[-1])
    largest = scaled.topk(int(top_k.max()), dim=-1).values
    return _keep(scaled, scaled >= largest.gather(-1, top_k - 1))


def keep_top_p(scaled: Tensor, top_p: Tensor) -> Tensor:
    """Keep of `scaled` [rows, vocab] the fewest tokens whose probabilities reach `top_p` [rows, 1].

    In order of falling probability and rising id, a token stays if the sum of the tokens before it
    is below top_p. So on a tie at the border the lowest ids stay. transformers sums from below, and
    keeps the ids that its sort puts last.
    """
    probabilities = scaled.softmax(dim=-1)
    # Tokens below an equal share of the dropped mass never stay. Half of it, for rounding.
    least = ((1.0 - top_p - 1e-5) / (2 * scaled.shape[-1])).clamp(min=0.0)
    descending, order = _descending(probabilities, least.float())
    before = descending.cumsum(dim=-1) - descending
    kept = torch.zeros_like(scaled, dtype=torch.bool)
    # The most likely token must stay even if top_p is 0 in float32.
    top_p = top_p.float().clamp(min=torch.finfo(torch.float32).tiny)
    return _keep(scaled, kept.scatter_(-1, order, before < top_p))


def keep_min_p(scaled: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens of `scaled` [rows, vocab] below `min_p` [rows, 1] x the highest probability."""
    probabilities = scaled.softmax(dim=-1)
    least = min_p.float() * probabilities.amax(dim=-1, keepdim=True)
    return _keep(scaled, probabilities >= least)


def _keep(scaled: Tensor, kept: Tensor) -> Tensor:
    # Ten times as fast as `masked_fill` on the processor.
    return torch.where(kept, scaled, -torch.inf)


def _descending(probabilities: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Sort [rows, vocab] stably; values not above `least` [rows, 1] may be left out."""
    # At least one: a row of NaN has no value above `least`.
    width = max(int((probabilities > least).sum(dim=-1).max()), 1)
    if 4 * width > probabilities.shape[-1]:
        return probabilities.sort(dim=-1, descending=True, stable=True)
    # `topk` of a few is much cheaper than a full sort. The second sort is stable, so ids rise.
    ids = probabilities.topk(width, dim=-1).indices.sort(dim=-1).values
    descending, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return descending, ids.gather(-1, order)
