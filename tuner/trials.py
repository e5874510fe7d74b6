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
from tqdm import tqdm

from a2sf.errors import InvalidArgument
from tuner.ledger import Ledger, Measured
from tuner.objective import Objective, effective
from tuner.search import Frame, Setting

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
        self, ledger: Ledger, objective: Objective, frame: Frame, minutes: float | None = None
    ) -> None:
        """`minutes` of measuring, summed over workers, end the search; None: trials alone do."""
        self.objective = objective
        self.frame = frame
        self.accounts: dict[str, Account] = {}
        self._ledger = ledger
        self._stage = ""
        self._left = 0
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._bar: Any = None

    @property
    def left(self) -> int:
        """Trials that the stage may still take; none once the time is over.

        The time is that of the batches so far, as the ledger tells it, and so the same for every
        worker and every run.
        """
        spent = sum(account.seconds for account in self.accounts.values())
        return self._left if spent < self._seconds else 0

    def feasible(self, setting: Setting) -> bool:
        """Whether the setting leaves every example slots that compete."""
        policy = self.frame.policy(setting)
        try:
            for length in {len(example.token_ids) for example in self.objective.examples}:
                effective(policy, self.objective.model, length)
        except InvalidArgument:
            return False
        return True

    @contextmanager
    def stage(self, name: str, trials: int) -> Iterator[None]:
        """Count what is measured as the stage's, and show how far it is of its most `trials`."""
        self._stage, self._left = name, trials
        self.accounts[name] = Account()
        with tqdm(total=trials, desc=name, unit="trial", leave=False) as self._bar:
            yield

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

    def measure(
        self,
        batch: str,
        settings: Sequence[Setting],
        *,
        best: Tried | None = None,
        from_layer: int = 0,
        examples: int | None = None,
    ) -> list[Tried]:
        """Measure settings in order, as many as the stage has trials left for.

        Those that are compared with a best end with the time, too.

        Args:
            batch: what to call them, for people who look into the study.
            settings: what to measure.
            best: what a setting must not be worse than, or be given up; None: measured to the end.
            from_layer: the settings agree with the best below this layer.
            examples: so many from the first on; None: all.
        """
        count = len(self.objective.examples) if examples is None else examples
        taken = settings[: self._left if best is None else self.left]
        if not taken:
            return []
        points = [{**setting.point(), "examples": count} for setting in taken]
        # A search that is run again with more trials may come to another best, and so to other
        # batches of the same name.
        content = json.dumps([points, best and best.setting.point()], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]

        def measure(_: int, point: dict[str, Any]) -> Measured:
            return self._measured(Setting.of(point), count, best, from_layer)

        found = self._ledger.measure(
            f"{self._stage}/{batch} {digest}",
            points,
            measure,
            progress=lambda _: self._bar.update(),
        )
        account = self.accounts[self._stage]
        account.trials += len(found)
        account.evaluations += sum(one.evaluations for one in found)
        account.seconds += sum(one.seconds for one in found)
        self._left -= len(found)
        tried = [
            Tried(setting, np.array(one.kl), whole=not one.given_up)
            for setting, one in zip(taken, found, strict=True)
        ]
        shown = min((one.mean for one in (*tried, *([best] if best else []))), default=np.nan)
        self._bar.set_postfix_str(f"best {shown:.4f} nats on {count} examples")
        return tried

    def halve(
        self, batch: str, settings: Sequence[Setting], rungs: Sequence[tuple[int, int]]
    ) -> list[Tried]:
        """Measure many settings on few examples, and ever fewer of them on more.

        Args:
            batch: what to call them.
            settings: what to measure.
            rungs: how many settings, and on the first how many examples; the last is on all.

        Returns:
            What the last rung measured, cheapest first.
        """
        ranked: list[Tried] = []
        chosen = list(settings)
        for kept, examples in rungs:
            tried = self.measure(f"{batch}/{examples}", chosen[:kept], examples=examples)
            ranked = sorted(tried, key=lambda one: one.mean)
            chosen = [one.setting for one in ranked]
        return ranked

    def rungs(self, settings: int) -> list[tuple[int, int]]:
        """Rounds of halving for so many settings: a fifth of them, then a third of those, on all.

        With few examples there are fewer rounds: each sees more examples than the one before.
        """
        count = len(self.objective.examples)
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


def _worse(kl: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    more = kl - best
    if not more.any():
        return False
    return bool(stats.wilcoxon(more, alternative="greater").pvalue < GIVE_UP_P)
