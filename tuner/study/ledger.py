"""The shared store of a fit: measurements, their workers, and decisions.

A search is written for one worker and one order. It asks the ledger to measure batches of points.
Any number of workers, on one machine or many, ask for the same batches in the same order and share
the work. A finished point is never measured again, so a search that was killed and restarted
replays what is stored and continues with the same result.

Owns the assignment of points to workers, and which measurements count. Knows nothing of models or
tables: a point is a JSON object and its costs come from a callable. One Optuna study holds all
data; `records` describes its trials.

No point is measured twice, without locks. A trial is created together with its point, in one
transaction, and trials are numbered in the order in which they become visible. So of two trials
with the same point, the one with the higher number finds the lower one when it looks after its own
creation, and withdraws before it measures, unless the lower one has failed. A failed trial can
never be finished, so every point has at most one finished trial.
"""

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from a2sf.errors import InvalidArgument
from tuner.study.lease import LEASE_GRACE, LEASE_PERIOD, WORKER, LeaseWatch, Worker, renewing
from tuner.study.records import (
    BATCH,
    FINISHED,
    INDEX,
    SETTLED,
    VALUE,
    PointCost,
    cost_of,
    digest_of,
    live_trials,
)
from tuner.study.storage import MAX_OUTAGE, OutageRetry

DEFINITION = "definition"
"""Key of the stored fit definition."""


Measure = Callable[[int, dict[str, Any]], PointCost]
"""Measures the point at an index of its batch."""

OnMeasured = Callable[[PointCost], None]
"""Called for every finished point of a batch, from any worker and any earlier run."""


@dataclass(frozen=True)
class Timing:
    """How often workers poll and renew leases, and how long they wait; all in seconds."""

    poll: float = 0.5
    lease_period: float = LEASE_PERIOD
    lease_grace: float = LEASE_GRACE
    max_outage: float = MAX_OUTAGE


class Ledger:
    """One fit's measurements and decisions, shared by all its workers.

    Every method may raise Unavailable if the storage is unavailable for longer than `max_outage`.
    Create it in the process that uses it, and use it from one thread at a time.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        definition: Mapping[str, Any],
        timing: Timing | None = None,
        *,
        chosen: Mapping[str, str] | None = None,
    ) -> None:
        """Create or continue the study `name`; InvalidArgument if it was made for another fit.

        `chosen` gives reasons for parts of the definition that the user did not set; each part can
        be set by an option of its name.
        """
        self.name = name
        self._timing = timing or Timing()
        self._storage = storage
        self._retry = OutageRetry(name, self._timing.max_outage)
        self._worker = Worker.current()
        self._watch = LeaseWatch(self._worker, self._timing.lease_grace)
        self._study = self._retry(
            optuna.create_study, storage=storage, study_name=name, load_if_exists=True
        )
        self._study_id = self._retry(storage.get_study_id_from_name, name)
        self._check_definition(json.loads(json.dumps(definition)), chosen or {})

    def _check_definition(self, here: dict[str, Any], chosen: Mapping[str, str]) -> None:
        there = self.decide_once(DEFINITION, here)
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                why = f", because {chosen[key]}" if key in chosen else ""
                same = f"--{key} {there.get(key)}, or " if key in chosen else ""
                raise InvalidArgument(
                    "study",
                    f"{self.name!r} in this storage was made for another fit: {key} is "
                    f"{there.get(key)!r} there and {here.get(key)!r} here{why}; give {same}"
                    "another --study or --out",
                )

    # What is known ---------------------------------------------------------------------------

    @property
    def trials(self) -> int:
        """Points measured so far, including those given up."""
        return len(self._finished())

    @property
    def evaluations(self) -> float:
        """Work done so far, in passes over all examples and layers."""
        return math.fsum(trial.user_attrs["evaluations"] for trial in self._finished())

    @property
    def seconds(self) -> float:
        """Wall time of measuring so far, summed over runs and workers."""
        return math.fsum(trial.user_attrs["seconds"] for trial in self._finished())

    def of(self, batch: str) -> dict[int, PointCost]:
        """Measurements of a batch so far, by index."""
        found = [t for t in self._finished() if t.user_attrs[BATCH] == batch]
        return {t.user_attrs[INDEX]: cost_of(t) for t in found}

    def _finished(self) -> list[FrozenTrial]:
        return [t for t in self._trials() if t.state in FINISHED and BATCH in t.user_attrs]

    def _trials(self) -> list[FrozenTrial]:
        return self._retry(self._study.get_trials, deepcopy=False)

    # Decisions -------------------------------------------------------------------------------

    def decide_once(self, key: str, value: Any) -> Any:
        """Decide a JSON value once for all workers and runs: the first call decides."""
        if not self._decisions(key):
            # If the answer is lost, the value is written twice; the first one counts.
            decision = create_trial(state=TrialState.FAIL, user_attrs={SETTLED: key, VALUE: value})
            self._retry(self._storage.create_new_trial, self._study_id, decision)
        return self.decided(key)

    def decided(self, key: str) -> Any:
        """The value decided under a key; None if there is none yet."""
        first = min(self._decisions(key), key=lambda trial: trial.number, default=None)
        return None if first is None else first.user_attrs[VALUE]

    def _decisions(self, key: str) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.user_attrs.get(SETTLED) == key]

    # Measurements ----------------------------------------------------------------------------

    def measure(
        self,
        batch: str,
        points: Sequence[dict[str, Any]],
        measure: Measure,
        progress: OnMeasured | None = None,
        *,
        max_points: int | None = None,
    ) -> list[PointCost]:
        """Return the costs of the points of a batch, in their order, once all are measured.

        Measures points without a worker, waits for points of other workers, and takes over points
        of lost workers. `batch` is unique in the fit. Only the first `max_points` points are
        measured (None: all); a later call may ask for more of the same batch, and stored
        measurements are kept. Raises InvalidArgument if the batch was begun with other points, and
        everything that `measure` raises.
        """
        digest = digest_of(points)
        count = len(points) if max_points is None else min(max_points, len(points))
        reported: set[int] = set()
        while True:
            live = self._live(batch, digest)
            finished = {
                t.user_attrs[INDEX]: t
                for t in live
                if t.state in FINISHED and t.user_attrs[INDEX] < count
            }
            if progress is not None:
                for index in sorted(finished.keys() - reported):
                    progress(cost_of(finished[index]))
                reported |= finished.keys()
            if len(finished) == count:
                return [cost_of(finished[index]) for index in range(count)]
            taken = {trial.user_attrs[INDEX] for trial in live}
            free = next((i for i in range(count) if i not in taken), None)
            if free is None:
                # Random pauses, so that waiting workers rarely find the next free point at the same
                # time.
                time.sleep(self._timing.poll * random.uniform(0.5, 1.5))
                continue
            self._claim_and_measure(
                {BATCH: batch, INDEX: free, "point": points[free], "digest": digest}, measure
            )

    def _live(self, batch: str, digest: str) -> list[FrozenTrial]:
        """Set trials of lost workers to failed; return the batch's running and finished trials."""
        trials = self._trials()
        running = [t for t in trials if t.state == TrialState.RUNNING and BATCH in t.user_attrs]
        abandoned = self._watch.abandoned(running)
        for trial in abandoned:
            self._set_failed(
                self._retry(
                    self._storage.get_trial_id_from_study_id_trial_number,
                    self._study_id,
                    trial.number,
                )
            )
        if abandoned:
            trials = self._trials()
        live = live_trials(trials, batch)
        if any(trial.user_attrs["digest"] != digest for trial in live):
            raise InvalidArgument(
                "study",
                f"batch {batch!r} of {self.name!r} in this storage was begun with other points: "
                "the search has changed since; give another --study or --out",
            )
        return live

    def _claim_and_measure(self, claim: dict[str, Any], measure: Measure) -> None:
        """Take the free point of a claim and measure it, unless another worker was faster."""
        born = create_trial(
            state=TrialState.RUNNING, user_attrs={**claim, **self._worker.attributes()}
        )
        # If the answer is lost, a second trial is created. The first also belongs to this worker,
        # so it does not count as a rival, and the next look finds it abandoned.
        trial_id = self._retry(self._storage.create_new_trial, self._study_id, born)
        try:
            number = self._retry(self._storage.get_trial, trial_id).number
            if any(
                trial.number < number
                and trial.user_attrs[INDEX] == claim[INDEX]
                and trial.user_attrs[WORKER]["key"] != self._worker.key
                for trial in live_trials(self._trials(), claim[BATCH])
            ):
                self._set_failed(trial_id)
                return
            with renewing(self._storage, trial_id, self._timing.lease_period):
                began = time.perf_counter()
                measured = measure(claim[INDEX], claim["point"])
                self._store(trial_id, replace(measured, seconds=time.perf_counter() - began))
        except BaseException:
            # One attempt only: the original error matters more, and other workers will find this
            # trial abandoned.
            with suppress(Exception):
                self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
            raise

    def _store(self, trial_id: int, measured: PointCost) -> None:
        if not math.isfinite(measured.mean):
            raise ValueError(f"a mean KL of {measured.mean} nats cannot be compared with others")
        state = TrialState.PRUNED if measured.pruned else TrialState.COMPLETE
        # The trial may be finished already: the answer to an earlier attempt was lost, or other
        # workers considered this one lost. The next look reads the final state, the same for all
        # workers.
        with suppress(UpdateFinishedTrialError):
            for key, value in asdict(measured).items():
                if key != "pruned":
                    self._retry(self._storage.set_trial_user_attr, trial_id, key, value)
            self._retry(self._storage.set_trial_state_values, trial_id, state, [measured.mean])

    def _set_failed(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self._retry(self._storage.set_trial_state_values, trial_id, TrialState.FAIL)
