"""What is searched: settings of the cache, and the scales that they lie on.

Owns the scale of forgetting (log tau, with exact 0 and exact 1 as members), a setting and its form
in a study, and the frame that all settings of one fit share. Knows nothing of how a setting is
chosen, measured or stored.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from a2sf.schema import TablePolicy, UniformSetting

LOG_TAU_MAX = math.log(2000)
"""Beyond 2,000 tokens a factor cannot be told from 1 on sequences of the lengths fitted here."""

Alphas = tuple[tuple[float, ...], ...]
"""[num_layers][num_kv_heads]"""


def alpha_of(log_tau: float) -> float:
    """Forgetting factor `1 - 1/tau`: exactly 0 at or below log tau 0, exactly 1 at the maximum."""
    if log_tau >= LOG_TAU_MAX:
        return 1.0
    # Six digits, so that what a file shows is what was measured.
    return round(-math.expm1(-max(log_tau, 0.0)), 6)


def log_tau_of(alpha: float) -> float:
    """The inverse of `alpha_of`, within [0, LOG_TAU_MAX]."""
    return LOG_TAU_MAX if alpha >= 1.0 else min(-math.log1p(-alpha), LOG_TAU_MAX)


@dataclass(frozen=True)
class Setting:
    """Everything that a search may change."""

    alpha: Alphas
    layer_share: tuple[float, ...]
    """[num_layers] slots of a layer as multiples of the budget; their mean is 1."""
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

    def with_slots(self, layers: Collection[int], factor: float) -> Self:
        """The same with `factor` times the slots for some layers, at the cost of all."""
        shares = [s * factor if at in layers else s for at, s in enumerate(self.layer_share)]
        total = sum(shares)
        # Four digits: what a file shows is what was measured, and no slot hangs on the fifth.
        return replace(self, layer_share=tuple(round(len(shares) * s / total, 4) for s in shares))

    def _with_row(self, layer: int, row: tuple[float, ...]) -> Self:
        return replace(self, alpha=(*self.alpha[:layer], row, *self.alpha[layer + 1 :]))

    def point(self) -> dict[str, Any]:
        """The setting as a JSON document."""
        return {
            "alpha": [list(row) for row in self.alpha],
            "layer_share": list(self.layer_share),
            "recent_share": self.recent_share,
            "sinks": self.sinks,
        }

    @classmethod
    def of(cls, point: Mapping[str, Any]) -> Self:
        """The inverse of `point`."""
        return cls(
            alpha=tuple(tuple(row) for row in point["alpha"]),
            layer_share=tuple(point["layer_share"]),
            recent_share=point["recent_share"],
            sinks=point["sinks"],
        )


@dataclass(frozen=True)
class Frame:
    """What every setting of one fit has in common."""

    num_layers: int
    num_kv_heads: int
    budget: int | None
    budget_ratio: float | None
    prefill_chunk: int

    def policy(self, setting: Setting) -> TablePolicy:
        """Complete a setting to a policy."""
        heads = range(self.num_kv_heads)
        return TablePolicy(
            alpha=setting.alpha,
            head_share=tuple(tuple(share for _ in heads) for share in setting.layer_share),
            recent_share=setting.recent_share,
            sinks=setting.sinks,
            budget=self.budget,
            budget_ratio=self.budget_ratio,
            prefill_chunk=self.prefill_chunk,
        )

    def uniform(self, setting: UniformSetting) -> Setting:
        """One alpha everywhere, and equal slots."""
        return Setting(
            alpha=((setting.alpha,) * self.num_kv_heads,) * self.num_layers,
            layer_share=(1.0,) * self.num_layers,
            recent_share=setting.recent_share,
            sinks=setting.sinks,
        )
