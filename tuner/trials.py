"""Measuring settings, as a search sees it: in batches, within a number of trials, against the best.

Owns when a setting is given up before all examples are seen, when one counts as better than
another, and the account of what each stage took. Knows nothing of how settings are proposed, nor of
how batches are shared among workers: that is the ledger's.
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
from tuner.ledger import Ledger, Measured
from tuner.objective import Objective, effective
from tuner.progress import Progress
from tuner.search import Frame, Setting

PROOF_SHARE = 1 / 3
"""Of the time that the proof is kept, at most: less where it is known to take less."""

FEW = 5
"""Settings that are measured on all examples at once: halving them would take more trials."""

LOOK = 8
"""Examples between two looks at whether a setting is still worth the rest."""

GIVE_UP_P = 0.05
"""A setting is given up where a signed-rank test finds it worse than the best with this p."""


@dataclass(frozen=True)
class Tried:
    """A setting and what it cost."""

    setting: Setting
    kl: NDArray[np.float64]
    """[examples seen] nats."""
    whole: bool
    """Whether it was not given up."""

    @property
    def mean(self) -> float:
        """Mean KL in nats; infinite where the setting was given up."""
        return float(self.kl.mean()) if self.whole else float("inf")

    def gain(self, over: "Tried") -> float:
        """By how much it costs less than `over`, mean nats of the pairs; 0 where that is noise.

        Noise is less than one standard error of the difference. Of many settings that are all as
        good, the one that chance favours most would otherwise be taken every time.
        """
        if not self.whole:
            return 0.0
        less = over.kl[: len(self.kl)] - self.kl
        error = less.std(ddof=1) / np.sqrt(len(less))
        return float(less.mean()) if less.mean() > error else 0.0


@dataclass
class Account:
    """What one stage took."""

    trials: int = 0
    evaluations: float = 0.0
    """Passes over all examples through all layers."""
    seconds: float = 0.0


class Trials:
    """The trials of one fit: measured once each, by whichever worker, and accounted by stage."""

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
            ledger: shares and remembers.
            objective: measures.
            frame: completes settings to policies.
            minutes: of measuring, the proof included and summed over workers; None: no limit.
            proof_rows: examples that the proof runs, one for each policy and held-out example.
            progress: shows how far the search is; None: one that knows no number of stages.
            most: trials of the whole search, by which is told what is left of it; None: not known.
        """
        self.objective = objective
        self.frame = frame
        self.accounts: dict[str, Account] = {}
        self.notes: list[str] = []
        """What was cut short and why, in a sentence each."""
        self.progress = progress or Progress("stage")
        self._ledger = ledger
        self._proof_rows = proof_rows
        self._stage = ""
        self._left = 0
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._until = math.inf
        self._most = most

    # All times are those that the ledger keeps, and so the same for every worker and every run:
    # all of them stop at the same place.

    @property
    def seconds_spent(self) -> float:
        """Seconds of measuring so far."""
        return math.fsum(account.seconds for account in self.accounts.values())

    @property
    def seconds_left(self) -> float:
        """Seconds of measuring that are left of all; infinite without a limit."""
        return self._seconds - self.seconds_spent

    @property
    def seconds_a_row(self) -> float:
        """Seconds that one example has taken through all layers; 0 while none is known."""
        passes = math.fsum(account.evaluations for account in self.accounts.values())
        return self.seconds_spent / (passes * len(self.objective.examples)) if passes else 0.0

    @property
    def seconds_a_trial(self) -> float:
        """Mean seconds of a trial; 0 while none is known."""
        count = sum(account.trials for account in self.accounts.values())
        return self.seconds_spent / count if count else 0.0

    @property
    def left(self) -> int:
        """Trials that the stage may still take; none once its time is over."""
        return self._left if self.seconds_spent < self._until else 0

    @property
    def seconds_of_stage(self) -> float:
        """Seconds of measuring that are left of the stage; infinite without a limit."""
        return max(self._until - self.seconds_spent, 0.0)

    def feasible(self, setting: Setting, frame: Frame | None = None) -> bool:
        """Whether the setting leaves every example slots that compete, in the frame or another."""
        policy = (frame or self.frame).policy(setting)
        try:
            for length in {len(example.token_ids) for example in self.objective.examples}:
                effective(policy, self.objective.model, length)
        except InvalidArgument:
            return False
        return True

    @contextmanager
    def stage(self, name: str, trials: int, share: float = 1.0) -> Iterator[None]:
        """Count what is measured as the stage's, of which it may take so many `trials`.

        The stage may take this `share` of the time that is left to the search.
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
        """Show how far the search is, with seconds and trials that no account counts yet."""
        self.progress.show(detail, *self._estimated(seconds, trials))

    def _estimated(self, seconds: float = 0.0, trials: int = 0) -> tuple[float, float | None]:
        """Seconds that the run has taken, and that are left of it at most, about."""
        done = self.seconds_spent + seconds
        count = trials + sum(account.trials for account in self.accounts.values())
        left = [self._seconds - done] if math.isfinite(self._seconds) else []
        if self._most is not None and count:
            proof = self._proof_rows * self.seconds_a_row
            left.append(max(self._most - count, 0) * done / count + proof)
        return done, min(left, default=None)

    def settled(self, key: str, make: Callable[[], tuple[Any, float]]) -> Any:
        """Return the JSON value that was made first for all workers, and count its work.

        Args:
            key: unique within the stage.
            make: gives the value and its work in evaluations; called where none is known yet.
        """
        key = f"{self._stage}/{key}"
        known = self._ledger.settled(key)
        if known is None:
            began = time.perf_counter()
            value, evaluations = make()
            seconds = time.perf_counter() - began
            made = {"value": value, "evaluations": evaluations, "seconds": seconds}
            known = self._ledger.settle(key, made)
        self.accounts[self._stage].evaluations += known["evaluations"]
        self.accounts[self._stage].seconds += known["seconds"]
        return known["value"]

    def affords(self, evaluations: float) -> bool:
        """Whether the stage has trials left, and time for so much work as far as is known."""
        row = self.seconds_a_row * len(self.objective.examples)
        return self.left > 0 and self.seconds_spent + evaluations * row <= self._until

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
        """Measure settings in order, as many as there are trials and time left for.

        Args:
            batch: what to call them, for people who look into the study.
            settings: what to measure.
            best: what a setting must not be worse than, or be given up; None: measured to the end.
            from_layer: the settings agree with the best below this layer.
            examples: so many from the first on; None: all.
            most: so many settings from the first on; None: all.
            least: so many settings are measured even where the time is over.
            until: seconds of measuring after which no more is begun; None: those of the stage.
        """
        count = len(self.objective.examples) if examples is None else examples
        limit = min(len(settings), self._left, len(settings) if most is None else most)
        until = self._until if until is None else until
        if limit <= 0 or (self.seconds_spent >= until and not least):
            return []
        # All of them, whatever is measured: a run with more trials or time goes on with the batch.
        points = [{**setting.point(), "examples": count} for setting in settings]
        # A search that is run again with more trials may come to another best, and so to other
        # batches of the same name.
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
        """Show a batch under way: what it has measured, and the least cost so far."""
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
        """How many more of a batch to measure before looking at the time again."""
        known, rest = len(found), limit - len(found)
        if math.isinf(until):
            return rest
        taken = math.fsum(one.seconds for one in found)
        left = until - self.seconds_spent - taken
        if left <= 0:
            return min(rest, max(least - known, 0))
        # Half of what seems to fit: an error in that costs little, and there are few looks.
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
        """Measure many settings on few examples, and ever fewer of them on more.

        Where trials or time are short, the first settings are measured: the best ones to have.

        Args:
            batch: what to call them.
            settings: what to measure.
            most: trials of all rounds together.
            share: of the stage's time that is left.
            least: so many of each round are measured even where the time is over.

        Returns:
            What was measured on all examples, cheapest first.
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
        """Rounds of halving for so many settings: a fifth of them, then a third of those, on all.

        Each is how many settings, and on the first how many examples. With few examples there are
        fewer rounds: each sees more examples than the one before. Few settings have one round.
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
            # Twice as many at each look: a pass of many costs less for each than one of few.
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
