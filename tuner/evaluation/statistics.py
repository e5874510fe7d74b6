"""Intervals and tests over examples.

Owns the bootstrap, the sign-flip test and Holm's correction. Knows nothing of what the figures
measure.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from a2sf.schema import Estimate

CONFIDENCE = 0.95
RESAMPLES = 9999


def estimate(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Mean of `values` (one per example, at least two) with its bootstrap interval (BCa)."""
    sample = np.asarray(values, dtype=np.float64)
    assert sample.ndim == 1
    assert len(sample) >= 2
    mean = float(sample.mean())
    # A spread at the level of rounding is zero; the bootstrap would divide by it.
    if np.ptp(sample) <= 1e-12 * np.abs(sample).max():
        return Estimate(mean=mean, low=mean, high=mean)
    interval = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean=mean, low=float(interval.low), high=float(interval.high))


def difference(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of ours minus theirs on the same examples; resamples pairs, not each side.

    If the whole interval is below 0, ours is lower than theirs.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
    assert first.shape == second.shape
    return estimate(first - second, seed=seed, resamples=resamples)


def sign_flip_p(
    differences: Sequence[Sequence[float] | np.ndarray],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[float]:
    """Two-sided p-values for a zero mean of paired differences, [comparisons][examples].

    Under the null hypothesis the sign of each difference is random. With more than about thirteen
    examples, `resamples` random flips replace the complete enumeration, so the smallest p-value is
    2 / (resamples + 1).
    """
    found = stats.permutation_test(
        (np.asarray(differences, dtype=np.float64),),
        np.mean,
        permutation_type="samples",
        axis=-1,
        n_resamples=resamples,
        vectorized=True,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return [float(p) for p in np.atleast_1d(found.pvalue)]


def enough_examples(comparisons: int) -> int:
    """The fewest examples with which a difference can be significant after Holm's correction.

    With n examples, the smallest two-sided p-value of a sign-flip test is 2 / 2^n.
    """
    n = 2
    while comparisons * 2 / 2**n >= 1 - CONFIDENCE:
        n += 1
    return n


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p-values valid for the whole family, in order."""
    p = np.asarray(p_values, dtype=np.float64)
    order = p.argsort(kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in corrected]
