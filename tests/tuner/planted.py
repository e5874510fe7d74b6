"""An objective whose best setting is known, in the place of a model."""

import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
from optuna.storages import InMemoryStorage

from a2sf.schema import TablePolicy
from tuner.evaluation.objective import Cost, Objective
from tuner.search.space import FitSpec, Setting, log_tau_of
from tuner.search.trials import Trials
from tuner.study.ledger import Ledger

SPEC = FitSpec(num_layers=3, num_kv_heads=2, budget=40, budget_ratio=None, prefill_chunk=0)


class Planted:
    """Costs rise with the square of the distance from `target`, on the scales of the search.

    All settings share the examples' own noise of `spread`, and each meets some of its own.
    """

    def __init__(
        self, target: Setting, *, examples: int = 16, spread: float = 0.3, own: float = 0.0
    ) -> None:
        layers, heads = len(target.alpha), len(target.alpha[0])
        shape = SimpleNamespace(num_layers=layers, num_kv_heads=heads)
        self.model = SimpleNamespace(shape=shape)
        self.examples = [SimpleNamespace(token_ids=range(100))] * examples
        self.calls: list[tuple[TablePolicy, range]] = []
        self.anchors: list[tuple[TablePolicy, int]] = []
        self._target = target
        self._own = own
        self._noise = np.random.default_rng(0).exponential(scale=spread, size=examples)

    def cost(self, policy: TablePolicy, examples: range) -> Cost:
        self.calls.append((policy, examples))
        kl = self.exact(policy) + self._noise[examples.start : examples.stop]
        rng = np.random.default_rng(zlib.crc32(repr((policy, examples.start)).encode()))
        kl = kl + self._own * rng.normal(size=len(kl))
        return Cost(kl=kl, nll=kl + 1)

    def exact(self, policy: TablePolicy | Setting) -> float:
        pairs = zip(sum(policy.alpha, ()), sum(self._target.alpha, ()), strict=True)
        off = sum((log_tau_of(mine) - log_tau_of(best)) ** 2 for mine, best in pairs)
        shares = zip(sum(policy.head_share, ()), sum(self._target.head_share, ()), strict=True)
        off += sum(np.log2(mine / best) ** 2 for mine, best in shares) / len(self._target.alpha[0])
        assert policy.recent_share is not None
        off += (policy.recent_share - self._target.recent_share) ** 2
        return 0.1 * float(off + (policy.sinks - self._target.sinks) ** 2 / 100)

    def anchor(self, policy: TablePolicy, layer: int) -> float:
        self.anchors.append((policy, layer))
        return 0.0

    def share_of_layers(self, _: TablePolicy) -> float:
        return 1.0


class Clock:
    """A clock that tests set; with the fixture `clock`, measurements are timed by it."""

    now = 0.0


class Timed(Planted):
    """A planted objective whose every example takes `row` seconds of a clock."""

    def __init__(self, clock: Clock, row: float, target: Setting | None = None) -> None:
        super().__init__(target or table((0.9, 0.8), (0.5, 0.0), (1.0, 0.99)), examples=32)
        self._clock, self._row = clock, row

    def cost(self, policy: TablePolicy, examples: range) -> Cost:
        self._clock.now += self._row * len(examples)
        return super().cost(policy, examples)


def trials_of(
    planted: Planted, storage: Any = None, minutes: float | None = None, proof_rows: int = 10**9
) -> Trials:
    """The trials of a fit whose objective is planted."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ledger = Ledger(storage or InMemoryStorage(), "x", {})
    return Trials(ledger, cast(Objective, planted), SPEC, minutes, proof_rows)


def table(*rows: Sequence[float], share: Sequence[float | Sequence[float]] = (1.0,) * 3) -> Setting:
    """A setting of the frame's shape, with a recent share of .25 and 4 sinks.

    `share` is of layers, or of each head.
    """
    dealt = tuple((s, s) if isinstance(s, float) else tuple(s) for s in share)
    return Setting(tuple(map(tuple, rows)), dealt, 0.25, 4)
