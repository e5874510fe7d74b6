"""Compares predictions with those of the full cache, for one example at a time.

Owns KL(full cache || evicted cache) of the next-token distribution, in nats at temperature 1, and
the likelihood of the true token. Knows nothing of policies, or of how examples share passes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, log_softmax
from torch.nn.functional import kl_div

from a2sf.errors import NonFinite
from a2sf.model.loader import LoadedModel
from a2sf.offline import teacher_forcing
from a2sf.offline.teacher_forcing import Example, Prediction

_NUMBERS_PER_COMPARISON = 1 << 18
"""Log-probabilities per comparison: 1 MB in float32 of each operand. On two cores with 49,152
words, comparing all positions at once took 8 times as long, mostly for fresh memory."""


def full_cache(model: LoadedModel, examples: Sequence[Example]) -> list[Tensor]:
    """Log-probabilities with the full cache, one tensor [counted, vocab] per example."""
    found = {
        index: log_softmax(one.logits, dim=-1)
        for index, one in teacher_forcing.predictions(model, examples, None)
    }
    return [found[index] for index in range(len(examples))]


def divergence(example: Example, found: Prediction, full: Tensor) -> tuple[float, float]:
    """Mean KL to the `full` cache's log-probabilities, and NLL, in nats per counted position.

    Raises NonFinite if either is not a finite number.
    """
    targets = torch.tensor([example.token_ids[t + 1] for t in example.counted])
    kl_parts, nll_parts = [], []
    parts = (found.logits, full, targets.to(full.device))
    count = _rows_per_comparison(full)
    for logits, log_p, target in zip(*(torch.split(t, count) for t in parts), strict=True):
        log_q = log_softmax(logits, dim=-1)
        terms = kl_div(log_q, log_p, reduction="none", log_target=True)
        total = terms.sum(dim=-1, dtype=torch.float64)
        if total.isnan().any():
            # A token with probability 0 in both costs nothing, but -inf minus -inf gives NaN.
            terms = terms.masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0.0)
            total = terms.sum(dim=-1, dtype=torch.float64)
        kl_parts.append(total)
        nll_parts.append(-log_q.gather(1, target[:, None])[:, 0].double())
    kl, nll = (float(torch.cat(parts).mean()) for parts in (kl_parts, nll_parts))
    check_finite(example, "KL to the full cache", kl)
    check_finite(example, "negative log-likelihood", nll)
    return kl, nll


def _rows_per_comparison(log_probabilities: Tensor) -> int:
    """Positions per comparison, so that the operands fit a processor's caches."""
    counted, vocabulary = log_probabilities.shape
    if log_probabilities.device.type != "cpu":
        return max(counted, 1)
    return max(_NUMBERS_PER_COMPARISON // vocabulary, 1)


def check_finite(example: Example, name: str, value: float) -> None:
    """Raise NonFinite, naming the figure, unless the value is a finite number."""
    if not math.isfinite(value):
        raise NonFinite(
            f"the {name} of an example of {len(example.token_ids)} tokens is {value}: the model "
            "gave NaN or infinity; where activations overflow in float16, give dtype bfloat16 or "
            "float32"
        )


def log_likelihoods(example: Example, log_probabilities: Tensor) -> Tensor:
    """Log-probability of each true next token, [counted] float64."""
    targets = [example.token_ids[position + 1] for position in example.counted]
    return log_probabilities[range(len(targets)), targets].double()


def negative_log_likelihood(example: Example, log_probabilities: Tensor) -> float:
    """Negative log-likelihood of the example's counted tokens, in nats per token."""
    return float(log_likelihoods(example, log_probabilities).neg().mean())
