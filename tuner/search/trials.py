"""Measures settings for a search: in batches, within limits, compared with the best so far.

Owns when a setting is given up before all examples are measured, when one counts as better than
another, and the account of each stage. Knows nothing of how settings are proposed, or of how
batches are shared among workers: the ledger does that.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from a2sf.errors import InvalidArgument
from tuner.evaluation.objective import Objective, effective
from tuner.progress import Progress
from tuner.search.space import Frame, Setting
from tuner.study.ledger import Ledger, Measured

PROOF_SHARE = 1 / 3
"""Largest share of the time that is kept for the proof; less if it is known to need less."""

FEW = 5
"""Up to this number, settings are measured on all examples; halving them would need more trials."""

LOOK = 8
"""Examples before the first check whether a setting is worth the rest."""

GIVE_UP_P = 0.05
"""A setting is given up if a signed-rank test finds it worse than the best with this p."""


@dataclass(frozen=True)
class Tried:
    """A setting and its measured cost."""

    setting: Setting
    kl: NDArray[np.float64]
    """[measured examples] nats."""
    whole: bool
    """Whether it was measured to the end, not given up."""

    @property
    def mean(self) -> float:
        """Mean KL in nats; infinite if the setting was given up."""
        return float(self.kl.mean()) if self.whole else float("inf")

    def gain(self, over: "Tried") -> float:
        """The mean difference by which it costs less than `over`, in nats; 0 if that is noise.

        Noise is less than one standard error of the paired difference. Without this threshold, the
        luckiest of many equally good settings would be chosen every time.
        """
        if not self.whole:
            return 0.0
        less = over.kl[: len(self.kl)] - self.kl
        error = less.std(ddof=1) / np.sqrt(len(less))
        return float(less.mean()) if less.mean() > error else 0.0


@dataclass
class Account:
    """The work of one stage."""

    trials: int = 0
    evaluations: float = 0.0
    """Passes over all examples through all layers."""
    seconds: float = 0.0


class Trials:
    """The trials of one fit: each measured once, by any worker, and accounted by stage."""

    def __init__(
        self,
        ledger: Ledger,
        objective: Objective,
        frame: Frame,
        minutes: float | None = None,
        proof_rows: int = 0,
        progress: Progress | None = None,
        most: int | None = None,
    ) -> None:
        """Begin with nothing measured.

        Args:
            ledger: shares measurements and stores them.
            objective: measures.
            frame: completes settings to policies.
            minutes: of measuring, including the proof, summed over workers; None: no limit.
            proof_rows: examples that the proof runs, one for each policy and held-out example.
            progress: shows the progress of the search; None: a display without stage numbers.
            most: trials of the whole search, for the estimate of the remaining time; None: unknown.
        """
        self.objective = objective
        self.frame = frame
        self.accounts: dict[str, Account] = {}
        self.notes: list[str] = []
        """What was cut short and why, one sentence each."""
        self.progress = progress or Progress("stage")
        self._ledger = ledger
        self._proof_rows = proof_rows
        self._stage = ""
        self._left = 0
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._until = math.inf
        self._most = most

    # All times come from the ledger, so they are the same for every worker and every run, and all
    # stop at the same point.

    @property
    def seconds_spent(self) -> float:
        """Seconds of measuring so far."""
        return math.fsum(account.seconds for account in self.accounts.values())

    @property
    def seconds_left(self) -> float:
        """Remaining seconds of measuring; infinite without a limit."""
        return self._seconds - self.seconds_spent

    @property
    def seconds_a_row(self) -> float:
        """Mean seconds of one example through all layers; 0 while unknown."""
        passes = math.fsum(account.evaluations for account in self.accounts.values())
        return self.seconds_spent / (passes * len(self.objective.examples)) if passes else 0.0

    @property
    def seconds_a_trial(self) -> float:
        """Mean seconds of a trial; 0 while unknown."""
        count = sum(account.trials for account in self.accounts.values())
        return self.seconds_spent / count if count else 0.0

    @property
    def left(self) -> int:
        """Remaining trials of the stage; none after its time is over."""
        return self._left if self.seconds_spent < self._until else 0

    @property
    def seconds_of_stage(self) -> float:
        """Remaining seconds of the stage's measuring; infinite without a limit."""
        return max(self._until - self.seconds_spent, 0.0)

    def feasible(self, setting: Setting, frame: Frame | None = None) -> bool:
        """Whether the setting leaves unprotected slots in every example, in `frame` if given."""
        policy = (frame or self.frame).policy(setting)
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
        self._stage, self._left = name, trials
        self.accounts[name] = Account()
        if math.isfinite(self._seconds):
            kept = PROOF_SHARE * self._seconds
            if self.seconds_a_row:
                kept = min(kept, self.seconds_a_row * self._proof_rows)
            self._until = self.seconds_spent + share * max(self.seconds_left - kept, 0.0)
        self.progress.begin(name, *self._estimated())
        yield

    def show(self, detail: str, seconds: float = 0.0, trials: int = 0) -> None:
        """Show the progress, with seconds and trials that no account contains yet."""
        self.progress.show(detail, *self._estimated(seconds, trials))

    def _estimated(self, seconds: float = 0.0, trials: int = 0) -> tuple[float, float | None]:
        """The run's seconds so far, and an approximate upper limit of the remaining seconds."""
        done = self.seconds_spent + seconds
        count = trials + sum(account.trials for account in self.accounts.values())
        left = [self._seconds - done] if math.isfinite(self._seconds) else []
        if self._most is not None and count:
            proof = self._proof_rows * self.seconds_a_row
            left.append(max(self._most - count, 0) * done / count + proof)
        return done, min(left, default=None)

    def settled(
        self,
        key: str,
        make: Callable[[], tuple[Any, float]],
        prepare: Callable[[], object] = lambda: None,
    ) -> Any:
        """Return the JSON value that a worker stored first, and account for its work.

        Args:
            key: unique within the stage.
            make: returns the value and its work in evaluations; called if no value is stored yet.
            prepare: called before `make`; its time is not counted.
        """
        key = f"{self._stage}/{key}"
        known = self._ledger.settled(key)
        if known is None:
            prepare()
            began = time.perf_counter()
            value, evaluations = make()
            seconds = time.perf_counter() - began
            made = {"value": value, "evaluations": evaluations, "seconds": seconds}
            known = self._ledger.settle(key, made)
        self.accounts[self._stage].evaluations += known["evaluations"]
        self.accounts[self._stage].seconds += known["seconds"]
        return known["value"]

    def measure(
        self,
        batch: str,
        settings: Sequence[Setting],
        *,
        best: Tried | None = None,
        from_layer: int = 0,
        examples: int | None = None,
        most: int | None = None,
        least: int = 0,
        until: float | None = None,
    ) -> list[Tried]:
        """Measure settings in order, as many as trials and time allow.

        Args:
            batch: the batch's name, for people who inspect the study.
            settings: what to measure.
            best: a setting that is worse than this is given up; None: all are measured to the end.
            from_layer: below this layer, the settings agree with the best.
            examples: number of examples, from the first; None: all.
            most: largest number of settings, from the first; None: all.
            least: number of settings that are measured even after the time is over.
            until: seconds of measuring after which no new measurement begins; None: the stage's
                limit.
        """
        count = len(self.objective.examples) if examples is None else examples
        limit = min(len(settings), self._left, len(settings) if most is None else most)
        until = self._until if until is None else until
        if limit <= 0 or (self.seconds_spent >= until and not least):
            return []
        # All settings are in the batch, even those not measured now: a run with more trials or time
        # continues it.
        points = [{**setting.point(), "examples": count} for setting in settings]
        # A repeated search with more trials may find another best, and so have other batches of the
        # same name.
        content = json.dumps([points, best and best.setting.point()], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]

        def measure(_: int, point: dict[str, Any]) -> Measured:
            return self._measured(Setting.of(point), count, best, from_layer)

        found: list[Measured] = []
        while (chunk := self._next(found, limit, least, until)) > 0:
            known = len(found)
            told: list[Measured] = []

            def progress(one: Measured, told: list[Measured] = told) -> None:
                told.append(one)
                self._tell(told, best, count)

            found = self._ledger.measure(
                f"{self._stage}/{batch} {digest}", points, measure, progress, most=known + chunk
            )
        account = self.accounts[self._stage]
        account.trials += len(found)
        account.evaluations += sum(one.evaluations for one in found)
        account.seconds += sum(one.seconds for one in found)
        self._left -= len(found)
        return [
            Tried(setting, np.array(one.kl), whole=not one.given_up)
            for setting, one in zip(settings, found, strict=False)
        ]

    def _tell(self, told: Sequence[Measured], best: Tried | None, examples: int) -> None:
        """Show a running batch: what it has measured, and the lowest cost so far."""
        costs = [one.mean for one in told if not one.given_up]
        shown = min([*costs, *([best.mean] if best else [])], default=math.inf)
        trials = self.accounts[self._stage].trials + len(told)
        self.show(
            f"{trials} trials"
            + (f", best {shown:.4f} nats on {examples} examples" if math.isfinite(shown) else ""),
            math.fsum(one.seconds for one in told),
            len(told),
        )

    def _next(self, found: Sequence[Measured], limit: int, least: int, until: float) -> int:
        """The number of settings to measure before the time is checked again."""
        known, rest = len(found), limit - len(found)
        if math.isinf(until):
            return rest
        taken = math.fsum(one.seconds for one in found)
        left = until - self.seconds_spent - taken
        if left <= 0:
            return min(rest, max(least - known, 0))
        # Half of the estimated number, to limit the effect of an error and the number of checks.
        return min(rest, max(1, int(left * known / taken / 2))) if known and taken else min(rest, 1)

    def halve(
        self,
        batch: str,
        settings: Sequence[Setting],
        most: int,
        share: float = 1.0,
        *,
        least: int = 0,
    ) -> list[Tried]:
        """Measure many settings on few examples, and fewer and fewer settings on more examples.

        If trials or time are short, only the first settings are measured, so order them by
        priority.

        Args:
            batch: the batch's name.
            settings: what to measure.
            most: trials of all rounds together.
            share: of the stage's remaining time.
            least: number of settings of each round that are measured even after the time is over.

        Returns:
            The settings measured on all examples, cheapest first.
        """
        most = min(most, self._left)
        fitting = (n for n in range(len(settings), 0, -1) if _trials(self.rungs(n)) <= most)
        rungs = self.rungs(next(fitting, 0))
        work = np.cumsum([kept * examples for kept, examples in rungs])
        began, time = self.seconds_spent, share * (self._until - self.seconds_spent)
        tried: list[Tried] = []
        reached = 1.0
        for number, (kept, examples) in enumerate(rungs):
            tried = self.measure(
                f"{batch}/{examples}",
                [one.setting for one in tried] if number else settings,
                examples=examples,
                most=max(1, round(reached * kept)),
                least=least,
                until=began + time * float(work[number] / work[-1]),
            )
            tried.sort(key=lambda one: one.mean)
            if number == 0:
                reached = len(tried) / kept
        return [one for one in tried if len(one.kl) == len(self.objective.examples)]

    def rungs(self, settings: int) -> list[tuple[int, int]]:
        """Rounds of halving: all settings, a fifth of them, then a third of those on all examples.

        Each round is a pair: the number of settings, and the number of examples, counted from the
        first. With few examples there are fewer rounds, because each must use more examples than
        the one before. Few settings have one round.
        """
        count = len(self.objective.examples)
        if settings <= FEW:
            return [(settings, count)] if settings else []
        planned = [
            (settings, max(2, count // 4)),
            (max(settings // 5, 2), max(2, count // 2)),
            (max(settings // 15, 1), count),
        ]
        return [
            rung
            for number, rung in enumerate(planned)
            if all(rung[1] > examples for _, examples in planned[:number])
        ]

    def _measured(
        self, setting: Setting, examples: int, best: Tried | None, from_layer: int
    ) -> Measured:
        policy = self.frame.policy(setting)
        work = 0.0
        if best is not None and from_layer > 0:
            work += self.objective.anchor(self.frame.policy(best.setting), from_layer)
        kl: list[float] = []
        nll: list[float] = []
        end = 0
        while end < examples:
            # Twice as many examples at each check, because a larger pass costs less per example.
            first, end = end, min(max(LOOK, 2 * end), examples) if best else examples
            cost = self.objective.cost(policy, range(first, end))
            kl += cost.kl.tolist()
            nll += cost.nll.tolist()
            if best is not None and end < examples and _worse(np.array(kl), best.kl[:end]):
                break
        seen = len(kl) / len(self.objective.examples)
        work += seen * self.objective.share_of_layers(policy)
        return Measured(kl=kl, nll=nll, evaluations=work, given_up=end < examples)


def _trials(rungs: Sequence[tuple[int, int]]) -> int:
    return sum(kept for kept, _ in rungs)


def _worse(kl: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    more = kl - best
    if not more.any():
        return False
    return bool(stats.wilcoxon(more, alternative="greater").pvalue < GIVE_UP_P)
