"""The search space: settings of the cache, and their scales.

Owns the scale of forgetting (log tau, including exact 0 and exact 1), a setting and its form in a
study, and the part that all settings of one fit share. Knows nothing of how a setting is chosen,
measured or stored.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Self

from a2sf.cache.slot_shares import Shares
from a2sf.schema import TablePolicy, UniformSetting

LOG_TAU_MAX = math.log(2000)
"""Beyond 2,000 tokens a factor is indistinguishable from 1 on sequences of the lengths used
here."""

Alphas = tuple[tuple[float, ...], ...]
"""[num_layers][num_kv_heads]"""


def alpha_of(log_tau: float) -> float:
    """Forgetting factor `1 - 1/tau`: exactly 0 at or below log tau 0, exactly 1 at the maximum."""
    if log_tau >= LOG_TAU_MAX:
        return 1.0
    # Six digits, so that the value in a file is the value that was measured.
    return round(-math.expm1(-max(log_tau, 0.0)), 6)


def log_tau_of(alpha: float) -> float:
    """The inverse of `alpha_of`, within [0, LOG_TAU_MAX]."""
    return LOG_TAU_MAX if alpha >= 1.0 else min(-math.log1p(-alpha), LOG_TAU_MAX)


def shares(weights: Sequence[Sequence[float]]) -> Shares:
    """Scale weights of heads to shares with mean 1: the `head_share` of a table.

    Rounded to four digits, so that the value in a file is the value that was measured. The fifth
    digit changes no slot.
    """
    mean = fmean(weight for row in weights for weight in row)
    return tuple(tuple(round(weight / mean, 4) for weight in row) for row in weights)


@dataclass(frozen=True)
class Setting:
    """Everything that a search may change."""

    alpha: Alphas
    head_share: Shares
    """Slots of a head as multiples of the budget; their mean is 1."""
    recent_share: float
    sinks: int

    def with_all(self, alpha: float) -> Self:
        """The same with one alpha for all heads."""
        return replace(self, alpha=tuple((alpha,) * len(row) for row in self.alpha))

    def with_layer(self, layer: int, alpha: float) -> Self:
        """The same with one alpha for all heads of a layer."""
        return self._with_row(layer, (alpha,) * len(self.alpha[layer]))

    def with_head(self, layer: int, head: int, alpha: float) -> Self:
        """The same with another alpha for one head."""
        row = self.alpha[layer]
        return self._with_row(layer, (*row[:head], alpha, *row[head + 1 :]))

    def with_layer_slots(self, layers: Collection[int], factor: float) -> Self:
        """The same with `factor` times the slots for all heads of some layers."""
        return self._with_shares(
            [s * factor if layer in layers else s for s in row]
            for layer, row in enumerate(self.head_share)
        )

    def with_shares_to(self, power: float) -> Self:
        """The same with every share to a power: below 1 slots differ less, above 1 more."""
        return self._with_shares([share**power for share in row] for row in self.head_share)

    def _with_shares(self, weights: Iterable[Sequence[float]]) -> Self:
        return replace(self, head_share=shares(list(weights)))

    def _with_row(self, layer: int, row: tuple[float, ...]) -> Self:
        return replace(self, alpha=(*self.alpha[:layer], row, *self.alpha[layer + 1 :]))

    def point(self) -> dict[str, Any]:
        """The setting as a JSON document."""
        return {
            "alpha": [list(row) for row in self.alpha],
            "head_share": [list(row) for row in self.head_share],
            "recent_share": self.recent_share,
            "sinks": self.sinks,
        }

    @classmethod
    def of(cls, point: Mapping[str, Any]) -> Self:
        """The inverse of `point`."""
        return cls(
            alpha=tuple(tuple(row) for row in point["alpha"]),
            head_share=tuple(tuple(row) for row in point["head_share"]),
            recent_share=point["recent_share"],
            sinks=point["sinks"],
        )


@dataclass(frozen=True)
class FitSpec:
    """The common part of all settings of one fit."""

    num_layers: int
    num_kv_heads: int
    budget: int | None
    budget_ratio: float | None
    prefill_chunk: int

    def policy(self, setting: Setting) -> TablePolicy:
        """Complete a setting to a policy."""
        return TablePolicy(
            **vars(setting),
            budget=self.budget,
            budget_ratio=self.budget_ratio,
            prefill_chunk=self.prefill_chunk,
        )

    @property
    def equal(self) -> Shares:
        """Equal slots for all heads."""
        return ((1.0,) * self.num_kv_heads,) * self.num_layers

    def uniform(self, setting: UniformSetting) -> Setting:
        """A setting with one alpha for all heads, and equal slots."""
        return Setting(
            alpha=((setting.alpha,) * self.num_kv_heads,) * self.num_layers,
            head_share=self.equal,
            recent_share=setting.recent_share,
            sinks=setting.sinks,
        )
