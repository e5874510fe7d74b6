"""Intervals over examples. Owns the bootstrap; knows nothing of what the figures measure."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from a2sf.schema import Estimate

CONFIDENCE = 0.95
RESAMPLES = 9999


def estimate(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Mean of `values` (one an example, at least two) with its bootstrap interval (BCa)."""
    sample = np.asarray(values, dtype=np.float64)
    assert sample.ndim == 1
    assert len(sample) >= 2
    mean = float(sample.mean())
    # Spread at the level of rounding is none, and would divide by it.
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
    """Mean of ours minus theirs on the same examples: resampling the pairs, never each side alone.

    Below 0 throughout, ours is lower than theirs.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
    assert first.shape == second.shape
    return estimate(first - second, seed=seed, resamples=resamples)
