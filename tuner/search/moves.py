"""Improves the best setting by changes of one layer, one head or the protection at a time.

Owns the coordinate stages: slots by layer, alpha by layer, alpha by head, protection, and the
rounds of smaller steps after them. Each stage measures single changes of the best setting, and then
combinations of the most promising ones. Knows nothing of how a setting is measured.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tuner.search.halving import successive_halving
from tuner.search.results import TrialResult
from tuner.search.space import LOG_TAU_MAX, Setting, alpha_of, log_tau_of
from tuner.search.trials import Trials

LAYER_ALPHAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
HEAD_ALPHAS = (0.0, 0.8, 0.95, 0.99, 1.0)
RECENT_SHARES = (0.0, 0.125, 0.25, 0.5)
SINKS = (0, 4)

MAX_BLOCKS = 8
"""Largest number of blocks of layers that are favoured one at a time; with few layers, a block is
one layer."""

FACTORS = (2.0, 6.0)
FAVOURED_ALPHAS = (0.0, 0.9, 0.99, 1.0)
FAVOURED_SHARES = (0.0, 0.5)

STEPS = (1.0, 0.5, 0.25)
"""Steps of the rounds of polishing: in log tau, and in log2 of a layer's slots."""


@dataclass(frozen=True)
class Move:
    """One change of a setting. Only one change of each `part` can be applied."""

    part: Hashable
    change: Callable[[Setting], Setting]


_PROTECTION = [
    *(Move("recent", partial(replace, recent_share=share)) for share in RECENT_SHARES),
    *(Move("sinks", partial(replace, sinks=count)) for count in SINKS),
]


class CoordinateSearch:
    """The best setting so far, and the stages that improve it. A stage ends when trials run out."""

    def __init__(self, trials: Trials, best: TrialResult) -> None:
        self.best = best
        self.trials = trials
        self._layers = range(trials.spec.num_layers)
        self._heads = range(trials.spec.num_kv_heads)
        self._effect = dict.fromkeys(self._layers, 0.0)
        """The largest observed effect of a layer's alpha, in nats."""

    def slots(self) -> None:
        """Split the slots among all layers.

        First, one block of layers is favoured at a time, with several uniform alphas, because the
        best alpha depends on the number of slots. From the best of these, layers get twice or half
        the slots, and one alpha for all and the protection are chosen again, as long as the cost
        falls.
        """
        if len(self._layers) == 1:
            return
        self._favour_blocks()
        number = 0
        before = None
        while self.best is not before:
            before = self.best
            self._try_moves(f"{number}/layers", self._layer_slot_steps(1.0))
            if len({alpha for row in self.best.setting.alpha for alpha in row}) == 1:
                self._try_moves(
                    f"{number}/uniform",
                    [
                        *(Move("alpha", partial(Setting.with_all, alpha=a)) for a in LAYER_ALPHAS),
                        *_PROTECTION,
                    ],
                )
            number += 1

    def _favour_blocks(self) -> None:
        """Start from the best of settings in which some layers have several times the slots."""
        size = -(-len(self._layers) // MAX_BLOCKS)
        blocks = [self._layers[first : first + size] for first in self._layers[::size]]
        starts = [
            replace(self.best.setting.with_all(alpha), recent_share=share)
            for alpha in FAVOURED_ALPHAS
            for share in FAVOURED_SHARES
        ]
        settings = [
            start.with_layer_slots(block, factor)
            for start in dict.fromkeys([self.best.setting, *starts])
            for block in blocks
            for factor in FACTORS
        ]
        feasible = [setting for setting in settings if self.trials.feasible(setting)]
        # Half of the trials and of the time are kept for the steps that follow.
        found = successive_halving(
            self.trials, "favour", feasible, self.trials.trials_left // 2, share=0.5
        )
        if found and found[0].gain(self.best) > 0:
            self.best = found[0]

    def layers(self) -> None:
        """Choose each layer's alpha, one for all its heads, from the bottom up."""
        for layer in self._layers:
            moves = [
                Move(layer, partial(Setting.with_layer, layer=layer, alpha=alpha))
                for alpha in LAYER_ALPHAS
            ]
            before = self.best
            for one in self._try_moves(f"layer {layer}", moves, layer):
                change = abs(float((one.kl - before.kl[: len(one.kl)]).mean()))
                self._effect[layer] = max(self._effect[layer], change)

    def heads(self) -> None:
        """Choose each head's alpha, first in the layers whose alpha matters most."""
        for layer in sorted(self._layers, key=lambda i: -self._effect[i]):
            moves = [
                Move(head, partial(Setting.with_head, layer=layer, head=head, alpha=alpha))
                for head in self._heads
                for alpha in HEAD_ALPHAS
            ]
            self._try_moves(f"heads of {layer}", moves, layer)

    def protection(self) -> None:
        """Choose the recent window and the sinks again, the same for all heads."""
        self._try_moves("protection", _PROTECTION)

    def polish(self) -> None:
        """Take smaller and smaller steps, until a round of the smallest steps gains nothing.

        Each round begins with the few steps that change all heads at once. Equal slots stay equal,
        because earlier stages decide whether heads may differ.
        """
        number = 0
        before = None
        while number < len(STEPS) or self.best is not before:
            before = self.best
            step = STEPS[min(number, len(STEPS) - 1)]
            self._try_moves(
                f"{number}/all", [*self._global_steps(step), *self._protection_steps(step)]
            )
            rows = self.best.setting.head_share
            if len({share for row in rows for share in row}) > 1:
                self._try_moves(f"{number}/slots", self._layer_slot_steps(step))
            for layer in self._layers:
                self._try_moves(f"{number}/layer {layer}", self._head_steps(layer, step), layer)
            number += 1
            if self.trials.trials_left == 0:
                return

    def _global_steps(self, step: float) -> list[Move]:
        """Steps for all heads: longer or shorter memory, and more or less difference in slots."""
        return [
            Move(part, change)
            for sign in (-step, step)
            for part, change in (
                ("log tau", partial(_step_all, step=sign)),
                ("power", partial(Setting.with_shares_to, power=2.0 ** (sign / 2))),
            )
        ]

    def _layer_slot_steps(self, step: float) -> list[Move]:
        """Moves that multiply or divide one layer's slots by `2^step`."""
        return [
            Move(layer, partial(Setting.with_layer_slots, layers=(layer,), factor=2.0**power))
            for layer in self._layers
            for power in (step, -step)
            if len(self._layers) > 1
        ]

    def _head_steps(self, layer: int, step: float) -> list[Move]:
        row = self.best.setting.alpha[layer]
        return [
            Move(head, partial(Setting.with_head, layer=layer, head=head, alpha=alpha))
            for head in self._heads
            for alpha in (stepped(row[head], -step), stepped(row[head], step))
        ]

    def _protection_steps(self, step: float) -> list[Move]:
        share, sinks = self.best.setting.recent_share, self.best.setting.sinks
        shares = (max(share - step / 8, 0.0), min(share + step / 8, 1.0))
        counts = (max(sinks - round(4 * step), 0), sinks + round(4 * step))
        return [
            *(Move("recent", partial(replace, recent_share=value)) for value in shares),
            *(Move("sinks", partial(replace, sinks=count)) for count in counts),
        ]

    def _try_moves(
        self, batch: str, moves: Sequence[Move], from_layer: int = 0
    ) -> list[TrialResult]:
        """Apply the best move or combination, if it gains; return the results of single moves."""
        before = self.best
        changed = {move.change(before.setting): move for move in moves}
        changed.pop(before.setting, None)
        changed = {one: move for one, move in changed.items() if self.trials.feasible(one)}
        singles = self.trials.measure(batch, list(changed), best=before, from_layer=from_layer)
        gains: dict[Hashable, tuple[float, Move]] = {}
        for one in singles:
            move = changed[one.setting]
            gain = one.gain(before)
            if gain > gains.get(move.part, (0.0, move))[0]:
                gains[move.part] = gain, move
        ranked = [move for _, move in sorted(gains.values(), key=lambda pair: -pair[0])]
        several = self.trials.measure(
            f"{batch}/together", self._combinations(ranked), best=before, from_layer=from_layer
        )
        better = [one for one in (*singles, *several) if one.gain(before) > 0]
        self.best = min(better, key=lambda one: one.mean, default=before)
        return singles

    def _combinations(self, ranked: Sequence[Move]) -> list[Setting]:
        """Combinations of the best two moves, the best four, eight, and so on, and all of them."""
        settings = []
        count = 2
        while len(ranked) > 1:
            setting = self.best.setting
            for move in ranked[:count]:
                setting = move.change(setting)
            if self.trials.feasible(setting):
                settings.append(setting)
            if count >= len(ranked):
                break
            count *= 2
        return settings


def _step_all(setting: Setting, step: float) -> Setting:
    return replace(
        setting, alpha=tuple(tuple(stepped(a, step) for a in row) for row in setting.alpha)
    )


def stepped(alpha: float, step: float) -> float:
    """Move an alpha by a step of log tau, within the ends of the scale."""
    return alpha_of(min(max(log_tau_of(alpha) + step, 0.0), LOG_TAU_MAX))
