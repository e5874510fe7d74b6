"""From logits to a token: temperature, the filters, and the draw.

Owns the arithmetic of one row's choice. A row's draw depends on its own logits and its own random
generator alone, never on its neighbours. Knows nothing of caches or schedules.
"""

import secrets

import torch
from torch import Tensor

from a2sf.requests import Sampling


def choose_seed(sampling: Sampling) -> int:
    """Return the request's seed, or a fresh one from 0 to 2^63 - 1."""
    return secrets.randbelow(2**63) if sampling.seed is None else sampling.seed


def generator(seed: int) -> torch.Generator:
    """Return a stream of noise for one request, on the processor: the same on every device."""
    return torch.Generator().manual_seed(seed)


def draw(logits: Tensor, sampling: Sampling, noise: torch.Generator) -> int:
    """Choose one token from `logits` [vocab].

    Draws by the exponential race: the least of `e_i / p_i`, with e_i exponential, falls on i with
    probability p_i. It takes one number of noise a token of the vocabulary, whatever the filters.
    """
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    probabilities = filtered_probabilities(logits, sampling)
    race = torch.empty(logits.shape, dtype=torch.float32).exponential_(generator=noise)
    return int((probabilities / race.to(probabilities.device)).argmax())


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution [vocab] that `draw` draws from, float32, for temperature > 0.

    Filters apply in turn, each to what the one before left: temperature, top_k, top_p, min_p.
    """
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[0]:
        least = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p < 1.0:
        descending, order = scaled.softmax(dim=-1).sort(descending=True, stable=True)
        before = descending.cumsum(dim=-1) - descending
        scaled = scaled.masked_fill(
            torch.zeros_like(before, dtype=torch.bool).scatter(0, order, before >= sampling.top_p),
            -torch.inf,
        )
    if sampling.min_p > 0.0:
        probabilities = scaled.softmax(dim=-1)
        scaled = scaled.masked_fill(
            probabilities < sampling.min_p * probabilities.max(), -torch.inf
        )
    return scaled.softmax(dim=-1)
