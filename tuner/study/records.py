"""The records of a study: the attributes of its trials, and the cost that a finished trial stores.

Owns the names and meanings of the attributes. Studies of earlier runs contain them, so they never
change. Knows nothing of workers, or of how a study is stored.

A measured point is a trial with the user attributes batch, index, point, digest (of the whole
batch), worker, lease, kl, nll, evaluations and seconds. Its state is complete, with the mean KL as
its value; pruned if it was given up early; failed if its worker was lost. A decision is a trial
created as failed, so that it does not count as a measurement, with the user attributes `settled`
and `value`.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

BATCH = "batch"


INDEX = "index"


SETTLED = "settled"


VALUE = "value"


FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class PointCost:
    """The cost of one point.

    `kl` and `nll` are in nats by example. `pruned` means that measuring stopped early, so that
    they cover only the first examples. `evaluations` is the work done, in passes over all examples
    and layers. `seconds` is the wall time, filled in by the ledger.
    """

    kl: list[float]
    nll: list[float]
    evaluations: float
    pruned: bool = False
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean KL in nats over the examples covered."""
        return math.fsum(self.kl) / len(self.kl)


def live_trials(trials: Sequence[FrozenTrial], batch: str) -> list[FrozenTrial]:
    """The trials of a batch that run or are finished."""
    return [
        trial
        for trial in trials
        if trial.user_attrs.get(BATCH) == batch and trial.state != TrialState.FAIL
    ]


def digest_of(points: Sequence[dict[str, Any]]) -> str:
    """SHA-256 (hex) over the points of a batch."""
    text = json.dumps(points, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def cost_of(trial: FrozenTrial) -> PointCost:
    """The cost that a finished trial stores."""
    attributes = trial.user_attrs
    return PointCost(
        kl=attributes["kl"],
        nll=attributes["nll"],
        evaluations=attributes["evaluations"],
        pruned=trial.state == TrialState.PRUNED,
        seconds=attributes["seconds"],
    )
