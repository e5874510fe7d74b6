"""The shared memory of a fit: what was measured, by whom, and what was settled.

A search is written as if it ran alone and in order. It asks the ledger to measure batches of
points; any number of workers, on one machine or many, ask for the same batches in the same order
and share the work. What is finished is never measured again, so that a search that was killed and
runs once more replays what is stored and goes on with the same result.

Owns who measures what, and what counts. Knows nothing of models or tables: a point is a JSON
object and its costs come from a callable. One Optuna study holds all of it. A measured point is a
trial with the user attributes batch, index, point, digest (of the whole batch), worker, lease, kl,
nll, evaluations and seconds: complete with the mean KL as its value, pruned if it was given up
early, failed if its worker was lost. A decision is a trial that is born failed, so that nothing
takes it for a measurement, with the user attributes `settled` and `value`.

Nothing is measured twice, without locks: A trial is born with the point it takes, in one
transaction, and trials are numbered in the order in which they become visible. So of two trials
with one point, the one with the higher number finds the lower when it looks after its own birth,
and withdraws before it measures, unless the lower has failed. A trial that failed can never be
finished, so that of every point at most one trial is.
"""

import hashlib
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
from tuner.lease import LEASE_GRACE, LEASE_PERIOD, WORKER, Watch, Worker, beating
from tuner.storage import PATIENCE, Patience

BATCH = "batch"
INDEX = "index"
SETTLED = "settled"
VALUE = "value"

DEFINITION = "definition"
"""The key under which is settled for what a study was made."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Measured:
    """What one point costs.

    `kl` and `nll` are in nats by example; `given_up` says that measuring stopped early, so that
    they cover only the first examples. `evaluations` is the work done, in passes over all examples
    and layers; `seconds` the wall time it took, which the ledger fills in.
    """

    kl: list[float]
    nll: list[float]
    evaluations: float
    given_up: bool = False
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean KL in nats over the examples covered."""
        return math.fsum(self.kl) / len(self.kl)


Measure = Callable[[int, dict[str, Any]], Measured]
"""Measures the point at an index of its batch."""

Progress = Callable[[Measured], None]
"""Is told of every point of a batch once it is finished, whoever measured it and whenever."""


@dataclass(frozen=True)
class Pace:
    """How often workers look and beat, and how long they wait; all in seconds."""

    poll: float = 0.5
    lease_period: float = LEASE_PERIOD
    lease_grace: float = LEASE_GRACE
    patience: float = PATIENCE


class Ledger:
    """One fit's measurements and decisions, shared by all its workers.

    Every method may raise Unavailable if the storage is away for longer than the patience. Made
    in the process that uses it, and used by one thread at a time.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        definition: Mapping[str, Any],
        pace: Pace | None = None,
        *,
        chosen: Mapping[str, str] | None = None,
    ) -> None:
        """Create or continue the study `name`; InvalidArgument if it was made for another fit.

        `chosen` says of parts of the definition that nobody gave why they are what they are here;
        each can be given by an option of its name.
        """
        self.name = name
        self._pace = pace or Pace()
        self._storage = storage
        self._patiently = Patience(name, self._pace.patience)
        self._worker = Worker.current()
        self._watch = Watch(self._worker, self._pace.lease_grace)
        self._study = self._patiently(
            optuna.create_study, storage=storage, study_name=name, load_if_exists=True
        )
        self._study_id = self._patiently(storage.get_study_id_from_name, name)
        self._claim(json.loads(json.dumps(definition)), chosen or {})

    def _claim(self, here: dict[str, Any], chosen: Mapping[str, str]) -> None:
        there = self.settle(DEFINITION, here)
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
        """Points measured so far, those given up included."""
        return len(self._finished())

    @property
    def evaluations(self) -> float:
        """Work done so far, in passes over all examples and layers."""
        return math.fsum(trial.user_attrs["evaluations"] for trial in self._finished())

    @property
    def seconds(self) -> float:
        """Wall time spent on measuring so far, summed over runs and workers."""
        return math.fsum(trial.user_attrs["seconds"] for trial in self._finished())

    def of(self, batch: str) -> dict[int, Measured]:
        """What was measured of a batch so far, by index."""
        found = [t for t in self._finished() if t.user_attrs[BATCH] == batch]
        return {t.user_attrs[INDEX]: _restored(t) for t in found}

    def _finished(self) -> list[FrozenTrial]:
        return [t for t in self._trials() if t.state in FINISHED and BATCH in t.user_attrs]

    def _trials(self) -> list[FrozenTrial]:
        return self._patiently(self._study.get_trials, deepcopy=False)

    # Decisions -------------------------------------------------------------------------------

    def settle(self, key: str, value: Any) -> Any:
        """Decide a JSON value once for all workers and runs: the first to come decides."""
        if not self._settled(key):
            # Should the answer be lost, the same is written twice; the first counts.
            decision = create_trial(state=TrialState.FAIL, user_attrs={SETTLED: key, VALUE: value})
            self._patiently(self._storage.create_new_trial, self._study_id, decision)
        return self.settled(key)

    def settled(self, key: str) -> Any:
        """What was decided under a key; None where nothing was yet."""
        first = min(self._settled(key), key=lambda trial: trial.number, default=None)
        return None if first is None else first.user_attrs[VALUE]

    def _settled(self, key: str) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.user_attrs.get(SETTLED) == key]

    # Measurements ----------------------------------------------------------------------------

    def measure(
        self,
        batch: str,
        points: Sequence[dict[str, Any]],
        measure: Measure,
        progress: Progress | None = None,
        *,
        most: int | None = None,
    ) -> list[Measured]:
        """Return the costs of the points of a batch, in their order, once they are measured.

        Measures those that nobody has taken, and waits for those that other workers have; takes
        over from workers that are lost. `batch` is unique in the fit. Of all the points only the
        first `most` are measured (None: all): a later call may ask for more of the same batch, and
        what is measured is kept. Raises InvalidArgument if the batch was begun with other points,
        and whatever `measure` raises.
        """
        digest = _digest(points)
        count = len(points) if most is None else min(most, len(points))
        told: set[int] = set()
        while True:
            live = self._live(batch, digest)
            finished = {
                t.user_attrs[INDEX]: t
                for t in live
                if t.state in FINISHED and t.user_attrs[INDEX] < count
            }
            if progress is not None:
                for index in sorted(finished.keys() - told):
                    progress(_restored(finished[index]))
                told |= finished.keys()
            if len(finished) == count:
                return [_restored(finished[index]) for index in range(count)]
            taken = {trial.user_attrs[INDEX] for trial in live}
            free = next((i for i in range(count) if i not in taken), None)
            if free is None:
                # Uneven, so that waiting workers seldom find the next free point together.
                time.sleep(self._pace.poll * random.uniform(0.5, 1.5))
                continue
            self._attempt(
                {BATCH: batch, INDEX: free, "point": points[free], "digest": digest}, measure
            )

    def _live(self, batch: str, digest: str) -> list[FrozenTrial]:
        """The batch's trials that run or are finished, once those of lost workers have failed."""
        trials = self._trials()
        running = [t for t in trials if t.state == TrialState.RUNNING and BATCH in t.user_attrs]
        abandoned = self._watch.abandoned(running)
        for trial in abandoned:
            self._fail(
                self._patiently(
                    self._storage.get_trial_id_from_study_id_trial_number,
                    self._study_id,
                    trial.number,
                )
            )
        if abandoned:
            trials = self._trials()
        live = _live(trials, batch)
        if any(trial.user_attrs["digest"] != digest for trial in live):
            raise InvalidArgument(
                "study",
                f"batch {batch!r} of {self.name!r} in this storage was begun with other points: "
                "the search has changed since; give another --study or --out",
            )
        return live

    def _attempt(self, claim: dict[str, Any], measure: Measure) -> None:
        """Take the free point of a claim and measure it, unless another worker was faster."""
        born = create_trial(
            state=TrialState.RUNNING, user_attrs={**claim, **self._worker.attributes()}
        )
        # Should the answer be lost, a second trial is born; the first, this worker's own, is no
        # rival, and the next look finds it abandoned.
        trial_id = self._patiently(self._storage.create_new_trial, self._study_id, born)
        try:
            number = self._patiently(self._storage.get_trial, trial_id).number
            if any(
                trial.number < number
                and trial.user_attrs[INDEX] == claim[INDEX]
                and trial.user_attrs[WORKER]["key"] != self._worker.key
                for trial in _live(self._trials(), claim[BATCH])
            ):
                self._fail(trial_id)
                return
            with beating(self._storage, trial_id, self._pace.lease_period):
                began = time.perf_counter()
                measured = measure(claim[INDEX], claim["point"])
                self._keep(trial_id, replace(measured, seconds=time.perf_counter() - began))
        except BaseException:
            # One try only: what went wrong matters more, and others will see that this one is
            # abandoned.
            with suppress(Exception):
                self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
            raise

    def _keep(self, trial_id: int, measured: Measured) -> None:
        if not math.isfinite(measured.mean):
            raise ValueError(f"a mean KL of {measured.mean} nats cannot be compared with others")
        state = TrialState.PRUNED if measured.given_up else TrialState.COMPLETE
        # Finished already: the answer was lost when this was done, or others took this worker for
        # lost. The next look tells, and all look at the same.
        with suppress(UpdateFinishedTrialError):
            for key, value in asdict(measured).items():
                if key != "given_up":
                    self._patiently(self._storage.set_trial_user_attr, trial_id, key, value)
            self._patiently(self._storage.set_trial_state_values, trial_id, state, [measured.mean])

    def _fail(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self._patiently(self._storage.set_trial_state_values, trial_id, TrialState.FAIL)


def _live(trials: Sequence[FrozenTrial], batch: str) -> list[FrozenTrial]:
    return [
        trial
        for trial in trials
        if trial.user_attrs.get(BATCH) == batch and trial.state != TrialState.FAIL
    ]


def _digest(points: Sequence[dict[str, Any]]) -> str:
    text = json.dumps(points, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _restored(trial: FrozenTrial) -> Measured:
    kept = trial.user_attrs
    return Measured(
        kl=kept["kl"],
        nll=kept["nll"],
        evaluations=kept["evaluations"],
        given_up=trial.state == TrialState.PRUNED,
        seconds=kept["seconds"],
    )
