"""The results of a search's measurements: what one setting costs, and what one stage took.

Owns when one setting counts as better or worse than another. Knows nothing of how settings are
measured or proposed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tuner.search.space import Setting


@dataclass(frozen=True)
class TrialResult:
    """A setting and its measured cost."""

    setting: Setting
    kl: NDArray[np.float64]
    """[measured examples] nats."""
    complete: bool
    """Whether it was measured to the end, not given up."""

    @property
    def mean(self) -> float:
        """Mean KL in nats; infinite if the setting was given up."""
        return float(self.kl.mean()) if self.complete else float("inf")

    def gain(self, over: "TrialResult") -> float:
        """The mean difference by which it costs less than `over`, in nats; 0 if that is noise.

        Noise is less than one standard error of the paired difference. Without this threshold, the
        luckiest of many equally good settings would be chosen every time.
        """
        if not self.complete:
            return 0.0
        less = over.kl[: len(self.kl)] - self.kl
        error = less.std(ddof=1) / np.sqrt(len(less))
        return float(less.mean()) if less.mean() > error else 0.0


@dataclass
class StageTotals:
    """The work of one stage."""

    trials: int = 0
    evaluations: float = 0.0
    """Passes over all examples through all layers."""
    seconds: float = 0.0


PRUNE_P = 0.05
"""A setting is given up if a signed-rank test finds it worse than the best with this p."""


def significantly_worse(kl: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    """Whether costs [examples] are higher than the best's by more than chance."""
    more = kl - best
    if not more.any():
        return False
    return bool(stats.wilcoxon(more, alternative="greater").pvalue < PRUNE_P)
