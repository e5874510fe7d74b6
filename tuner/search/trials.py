"""Measures settings for a search: in batches, within limits, compared with the best so far.

Owns when a setting is given up before all examples are measured, and the limits and the account of
each stage. Knows nothing of how settings are proposed, or of how
batches are shared among workers: the ledger does that.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from a2sf.errors import InvalidArgument
from tuner.evaluation.objective import Objective, effective
from tuner.progress import Progress
from tuner.search.results import StageTotals, TrialResult, significantly_worse
from tuner.search.space import FitSpec, Setting
from tuner.study.ledger import Ledger
from tuner.study.records import PointCost

PROOF_SHARE = 1 / 3
"""Largest share of the time that is kept for the proof; less if it is known to need less."""

FIRST_CHECK = 8
"""Examples before the first check whether a setting is worth the rest."""


class Trials:
    """The trials of one fit: each measured once, by any worker, and accounted by stage."""

    def __init__(
        self,
        ledger: Ledger,
        objective: Objective,
        spec: FitSpec,
        minutes: float | None = None,
        proof_rows: int = 0,
        progress: Progress | None = None,
        max_trials: int | None = None,
    ) -> None:
        """Begin with nothing measured.

        Args:
            ledger: shares measurements and stores them.
            objective: measures.
            spec: completes settings to policies.
            minutes: of measuring, including the proof, summed over workers; None: no limit.
            proof_rows: examples that the proof runs, one for each policy and held-out example.
            progress: shows the progress of the search; None: a display without stage numbers.
            max_trials: of the whole search, for the estimate of the remaining time; None: unknown.
        """
        self.objective = objective
        self.spec = spec
        self.stage_totals: dict[str, StageTotals] = {}
        self.notes: list[str] = []
        """What was cut short and why, one sentence each."""
        self.limits: set[str] = set()
        """The options that ended a stage or a part of it: --trials, --minutes, or both."""
        self.progress = progress or Progress("stage")
        self._ledger = ledger
        self._proof_rows = proof_rows
        self._stage = ""
        self._trials_left = 0
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._stage_deadline = math.inf
        self._max_trials = max_trials

    # All times come from the ledger, so they are the same for every worker and every run, and all
    # stop at the same point.

    @property
    def seconds_spent(self) -> float:
        """Seconds of measuring so far."""
        return math.fsum(totals.seconds for totals in self.stage_totals.values())

    @property
    def seconds_left(self) -> float:
        """Remaining seconds of measuring; infinite without a limit."""
        return self._seconds - self.seconds_spent

    @property
    def seconds_per_row(self) -> float:
        """Mean seconds of one example through all layers; 0 while unknown."""
        passes = math.fsum(totals.evaluations for totals in self.stage_totals.values())
        return self.seconds_spent / (passes * len(self.objective.examples)) if passes else 0.0

    @property
    def seconds_per_trial(self) -> float:
        """Mean seconds of a trial; 0 while unknown."""
        count = sum(totals.trials for totals in self.stage_totals.values())
        return self.seconds_spent / count if count else 0.0

    @property
    def trials_left(self) -> int:
        """Remaining trials of the stage; none after its time is over."""
        return self._trials_left if self.seconds_spent < self._stage_deadline else 0

    @property
    def stage_seconds_left(self) -> float:
        """Remaining seconds of the stage's measuring; infinite without a limit."""
        return max(self._stage_deadline - self.seconds_spent, 0.0)

    def feasible(self, setting: Setting, spec: FitSpec | None = None) -> bool:
        """Whether the setting leaves unprotected slots in every example, in `spec` if given."""
        policy = (spec or self.spec).policy(setting)
        try:
            for length in {len(example.token_ids) for example in self.objective.examples}:
                effective(policy, self.objective.model, length)
        except InvalidArgument:
            return False
        return True

    @contextmanager
    def stage(self, name: str, trials: int, share: float = 1.0) -> Iterator[None]:
        """Account for measurements as the stage `name`, with at most this many `trials`.

        The stage may take this `share` of the time that is left for the search.
        """
        self._stage, self._trials_left = name, trials
        self.stage_totals[name] = StageTotals()
        if math.isfinite(self._seconds):
            kept = PROOF_SHARE * self._seconds
            if self.seconds_per_row:
                kept = min(kept, self.seconds_per_row * self._proof_rows)
            self._stage_deadline = self.seconds_spent + share * max(self.seconds_left - kept, 0.0)
        self.progress.begin(name, *self._estimated())
        yield
        if self.trials_left == 0:
            self.limits.add("--minutes" if self._trials_left > 0 else "--trials")

    def show(self, detail: str, seconds: float = 0.0, trials: int = 0) -> None:
        """Show the progress, with seconds and trials that no account contains yet."""
        self.progress.show(detail, *self._estimated(seconds, trials))

    def _estimated(self, seconds: float = 0.0, trials: int = 0) -> tuple[float, float | None]:
        """The run's seconds so far, and an approximate upper limit of the remaining seconds."""
        done = self.seconds_spent + seconds
        count = trials + sum(totals.trials for totals in self.stage_totals.values())
        bounds = [self._seconds - done] if math.isfinite(self._seconds) else []
        if self._max_trials is not None and count:
            proof = self._proof_rows * self.seconds_per_row
            bounds.append(max(self._max_trials - count, 0) * done / count + proof)
        return done, min(bounds, default=None)

    def compute_once(self, key: str, make: Callable[[], tuple[Any, float]]) -> Any:
        """Return the JSON value that a worker stored first, and account for its work.

        Args:
            key: unique within the stage.
            make: returns the value and its work in evaluations; called if no value is stored yet.
        """
        key = f"{self._stage}/{key}"
        known = self._ledger.decided(key)
        if known is None:
            began = time.perf_counter()
            value, evaluations = make()
            seconds = time.perf_counter() - began
            computed = {"value": value, "evaluations": evaluations, "seconds": seconds}
            known = self._ledger.decide_once(key, computed)
        self.stage_totals[self._stage].evaluations += known["evaluations"]
        self.stage_totals[self._stage].seconds += known["seconds"]
        return known["value"]

    def measure(
        self,
        batch: str,
        settings: Sequence[Setting],
        *,
        best: TrialResult | None = None,
        from_layer: int = 0,
        examples: int | None = None,
        max_settings: int | None = None,
        min_settings: int = 0,
        deadline: float | None = None,
    ) -> list[TrialResult]:
        """Measure settings in order, as many as trials and time allow.

        Args:
            batch: the batch's name, for people who inspect the study.
            settings: what to measure.
            best: a setting that is worse than this is given up; None: all are measured to the end.
            from_layer: below this layer, the settings agree with the best.
            examples: number of examples, from the first; None: all.
            max_settings: largest number of settings, from the first; None: all.
            min_settings: number of settings that are measured even after the time is over.
            deadline: seconds of measuring after which no new measurement begins; None: the stage's
                limit.
        """
        count = len(self.objective.examples) if examples is None else examples
        limit = min(
            len(settings),
            self._trials_left,
            len(settings) if max_settings is None else max_settings,
        )
        deadline = self._stage_deadline if deadline is None else deadline
        if limit <= 0 or (self.seconds_spent >= deadline and not min_settings):
            return []
        # All settings are in the batch, even those not measured now: a run with more trials or time
        # continues it.
        points = [{**setting.point(), "examples": count} for setting in settings]
        # A repeated search with more trials may find another best, and so have other batches of the
        # same name.
        content = json.dumps([points, best and best.setting.point()], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]

        def measure(_: int, point: dict[str, Any]) -> PointCost:
            return self._measure_one(Setting.of(point), count, best, from_layer)

        found: list[PointCost] = []
        while (chunk := self._next_count(found, limit, min_settings, deadline)) > 0:
            known = len(found)
            reported: list[PointCost] = []

            def progress(one: PointCost, reported: list[PointCost] = reported) -> None:
                reported.append(one)
                self._report(reported, best, count)

            found = self._ledger.measure(
                f"{self._stage}/{batch} {digest}",
                points,
                measure,
                progress,
                max_points=known + chunk,
            )
        totals = self.stage_totals[self._stage]
        totals.trials += len(found)
        totals.evaluations += sum(one.evaluations for one in found)
        totals.seconds += sum(one.seconds for one in found)
        self._trials_left -= len(found)
        return [
            TrialResult(setting, np.array(one.kl), complete=not one.pruned)
            for setting, one in zip(settings, found, strict=False)
        ]

    def _report(
        self, reported: Sequence[PointCost], best: TrialResult | None, examples: int
    ) -> None:
        """Show a running batch: what it has measured, and the lowest cost so far."""
        costs = [one.mean for one in reported if not one.pruned]
        shown = min([*costs, *([best.mean] if best else [])], default=math.inf)
        trials = self.stage_totals[self._stage].trials + len(reported)
        self.show(
            f"{trials} trials"
            + (f", best {shown:.4f} nats on {examples} examples" if math.isfinite(shown) else ""),
            math.fsum(one.seconds for one in reported),
            len(reported),
        )

    def _next_count(
        self, found: Sequence[PointCost], limit: int, min_settings: int, deadline: float
    ) -> int:
        """The number of settings to measure before the time is checked again."""
        known, rest = len(found), limit - len(found)
        if math.isinf(deadline):
            return rest
        taken = math.fsum(one.seconds for one in found)
        left = deadline - self.seconds_spent - taken
        if left <= 0:
            return min(rest, max(min_settings - known, 0))
        # Half of the estimated number, to limit the effect of an error and the number of checks.
        return min(rest, max(1, int(left * known / taken / 2))) if known and taken else min(rest, 1)

    def _measure_one(
        self, setting: Setting, examples: int, best: TrialResult | None, from_layer: int
    ) -> PointCost:
        policy = self.spec.policy(setting)
        work = 0.0
        if best is not None and from_layer > 0:
            work += self.objective.anchor(self.spec.policy(best.setting), from_layer)
        kl: list[float] = []
        nll: list[float] = []
        end = 0
        while end < examples:
            # Twice as many examples at each check, because a larger pass costs less per example.
            first, end = end, min(max(FIRST_CHECK, 2 * end), examples) if best else examples
            cost = self.objective.cost(policy, range(first, end))
            kl += cost.kl.tolist()
            nll += cost.nll.tolist()
            if (
                best is not None
                and end < examples
                and significantly_worse(np.array(kl), best.kl[:end])
            ):
                break
        share = len(kl) / len(self.objective.examples)
        work += share * self.objective.share_of_layers(policy)
        return PointCost(kl=kl, nll=nll, evaluations=work, pruned=end < examples)
