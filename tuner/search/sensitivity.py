"""The sensitivity profile: the cost of each head alone with fewer slots, and settings based on it.

Owns the profiled budgets and alphas, the proposed settings, and two stages of a search: splitting
slots among heads, and an alpha for each head at its slots. The sum of single costs is only a prior:
every proposal is measured like any other setting. Knows nothing of how a head's cost is found
(`tuner.search.curvature`) or how a total is divided (`tuner.search.dealing`).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2sf.model.loader import LoadedModel
from a2sf.policy import EffectivePolicy
from tuner.evaluation.objective import effective
from tuner.search import curvature, dealing
from tuner.search.space import Frame, Setting, log_tau_of, shares
from tuner.search.trials import Trials, Tried

FRACTIONS = (0.15, 0.3, 0.6, 1.0, 1.75, 3.0)
"""Budgets to profile, as multiples of the mean budget, as far as they are below the length."""

ALPHAS = (0.8, 0.93, 0.98, 0.993, 1.0)

POWERS = (1.0, 0.75)
"""Exponents for the computed shares: unchanged, and closer to equal, because costs of single heads
do not add up."""

MOST_PROPOSALS = 2 * len(POWERS) + 3
"""Largest number of settings that `deal` and `alphas` together propose."""

FLOOR = 0.2
"""Fewest slots of a head as a share of the mean: with a budget of a fifth of the length, .04 of the
length."""

MOST_BYTES = 3 * 10**9
"""Approximate memory of the rows that are profiled together; at least one row."""

MOST_ROWS = 8

TIME_SHARE = 0.6
"""Share of the remaining time for the profile; if that is short, fewer examples are profiled."""


@dataclass(frozen=True)
class Profile:
    """The cost of each head alone by number of slots and alpha."""

    length: int
    """Tokens of a typical example; budgets are relative to it."""
    budgets: tuple[int, ...]
    """Slots, rising."""
    alphas: tuple[float, ...]
    costs: NDArray[np.float64]
    """[num_layers, num_kv_heads, budgets, alphas] nats. With one head per layer, that head
    represents the whole layer."""
    noise: NDArray[np.float64]
    """One standard error of each cost, of the same shape."""
    examples: int
    """Number of examples profiled."""

    def by_layer(self) -> "Profile":
        """The same with each layer as one head: costs [num_layers, 1, budgets, alphas]."""
        return replace(
            self,
            costs=self.costs.sum(axis=1, keepdims=True),
            noise=np.sqrt(np.square(self.noise).sum(axis=1, keepdims=True)),
        )

    def dealt(self, mean: int, floor: int, alpha: int | None) -> NDArray[np.int64]:
        """Split slots by the costs at an alpha of the grid, or at each head's cheapest (None)."""
        costs, noise = self.costs, self.noise
        if alpha is None:
            best = costs.argmin(axis=-1)[..., None]
            costs, noise = (np.take_along_axis(x, best, axis=-1)[..., 0] for x in (costs, noise))
        else:
            costs, noise = costs[..., alpha], noise[..., alpha]
        return dealing.deal(
            costs, self.budgets, mean=mean, floor=floor, most=self.length, noise=noise
        )

    def at(self, slots: NDArray[np.float64]) -> NDArray[np.float64]:
        """Costs of each head at its slots, by alpha: [num_layers, num_kv_heads, alphas]."""
        whole = np.clip(np.rint(slots), 1, self.length).astype(int)
        curves = np.stack(
            [
                dealing.predicted(
                    self.costs[..., at],
                    self.budgets,
                    range(1, self.length + 1),
                    noise=self.noise[..., at],
                )
                for at in range(len(self.alphas))
            ],
            axis=-1,
        )
        found: NDArray[np.float64] = np.take_along_axis(
            curves, (whole - 1)[..., None, None], axis=2
        )[:, :, 0]
        return found


def look(trials: Trials, best: Setting, load: Callable[[], LoadedModel]) -> Profile | None:
    """Make the profile with the protection of `best`; None if there is no time for any example.

    Args:
        trials: knows the remaining time, and stores results.
        best: the setting whose protection is used.
        load: loads the trials' model with `pack=False`; called only if a result is not stored yet.
    """
    frame, model, examples = trials.frame, trials.objective.model, trials.objective.examples
    lengths = [len(example.token_ids) for example in examples]
    length = round(float(np.mean(lengths)))
    looks = _looks(trials, best, length)
    if not looks or trials.left == 0:
        return None
    alphas = tuple(sorted({*ALPHAS, best.alpha[0][0]}))
    policies = [
        at.policy(replace(best.with_all(alpha), head_share=frame.equal))
        for at, _ in looks
        for alpha in alphas
    ]
    content = json.dumps([policy.model_dump(mode="json") for policy in policies], sort_keys=True)
    name = f"look {hashlib.sha256(content.encode()).hexdigest()[:16]}"
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    at_once = _at_once(model, lengths)
    rows = [order[first : first + at_once] for first in range(0, len(order), at_once)]
    began = trials.seconds_spent
    until = began + TIME_SHARE * trials.seconds_of_stage
    loaded: list[LoadedModel] = []
    sums: list[NDArray[np.float64]] = []
    count = 0
    ticks = 0
    begun = 0.0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        share = ticks / (len(rows) * curvature.ticks(model))
        trials.show(f"looking at every head, {share:.0%}", time.perf_counter() - begun)

    def prepare() -> None:
        loaded[:] = loaded or [load()]

    def make(batch: list[int]) -> tuple[Any, float]:
        nonlocal begun
        begun = time.perf_counter()
        texts = [examples[row] for row in batch]
        found = curvature.effects(loaded[0], texts, policies, tick)
        costs = (found.square().mean(dim=1) / 2).numpy()
        figures = np.stack([costs.sum(axis=0), np.square(costs).sum(axis=0)])
        return _digits(figures), curvature.work(len(policies)) * len(batch) / len(examples)

    # In random order, because the examples within the time should represent all of them.
    for number in np.random.default_rng(0).permutation(len(rows)).tolist():
        share = len(rows[number]) / len(examples)
        need = curvature.work(len(policies)) * share * trials.seconds_a_row * len(examples)
        if count:
            need = (trials.seconds_spent - began) / count * len(rows[number])
        if trials.seconds_spent + need > until:
            note = (
                f"The sensitivity profile is of {count} of {len(examples)} examples: more "
                "--minutes make it surer."
                if count
                else "There was no time for the sensitivity profile: it takes more --minutes."
            )
            # Both stages that need a profile may find no time for it.
            if note not in trials.notes:
                trials.notes.append(note)
            break
        key = f"{name}/{number}"
        sums.append(np.array(trials.settled(key, partial(make, rows[number]), prepare)))
        count += len(rows[number])
        ticks = len(sums) * curvature.ticks(model)
    if not count:
        return None
    mean, square = sum(sums[1:], start=sums[0]) / count
    error = np.sqrt(np.maximum(square - mean**2, 0.0) / max(count - 1, 1))
    shape = (*mean.shape[:2], len(looks), len(alphas))
    return Profile(
        length=length,
        budgets=tuple(slots for _, slots in looks),
        alphas=alphas,
        costs=mean.reshape(shape),
        noise=error.reshape(shape),
        examples=count,
    )


def _looks(trials: Trials, best: Setting, length: int) -> list[tuple[Frame, int]]:
    """The budgets to profile: as a frame, and in slots of a typical example."""
    frame, found = trials.frame, {}
    for fraction in FRACTIONS:
        ratio = None if frame.budget_ratio is None else fraction * frame.budget_ratio
        budget = None if frame.budget is None else round(fraction * frame.budget)
        at = replace(frame, budget=budget, budget_ratio=ratio)
        slots = budget if ratio is None else round(ratio * length)
        assert slots is not None
        if (ratio is None or ratio < 1) and slots < length and trials.feasible(best, at):
            found[slots] = at
    return [(at, slots) for slots, at in sorted(found.items())]


def _at_once(model: LoadedModel, lengths: Sequence[int]) -> int:
    """Approximate number of examples that fit into MOST_BYTES together."""
    config = model.module.config
    hidden, inner = config.hidden_size, config.intermediate_size
    numbers = max(lengths) * (
        model.shape.num_layers * ((10 + curvature.SAMPLES) * hidden + 3 * inner)
        + 6 * config.vocab_size
    )
    return max(1, min(MOST_ROWS, MOST_BYTES // (4 * int(numbers))))


def _digits(values: NDArray[np.float64]) -> Any:
    """Nested lists of numbers rounded to five digits, for storage in a study."""
    rounded = np.array([float(f"{value:.5g}") for value in values.flat])
    return rounded.reshape(values.shape).tolist()


def deal(trials: Trials, best: Tried, profile: Profile) -> Tried:
    """Measure settings with slots split by the profile, as a stage; return the best.

    Slots are split by each head's cost at the alpha nearest to the best setting's.
    """
    usual = log_tau_of(best.setting.alpha[0][0])
    nearest = min(
        range(len(profile.alphas)), key=lambda at: abs(log_tau_of(profile.alphas[at]) - usual)
    )
    dealt = _dealt(trials, best.setting, profile, nearest)
    return _measured(trials, "dealt", dealt, best)


def alphas(trials: Trials, best: Tried, profile: Profile) -> Tried:
    """Measure settings with alphas from the profile, as a stage; return the best.

    These are: every head at the cheapest alpha for its slots; the same for only the half, and the
    quarter, of heads that gain most; and, unless slots are equal, slots split again by each head's
    cost at its cheapest alpha, with those alphas.
    """
    settings = [_cheapest(trials, best.setting, profile, part) for part in (1, 2, 4)]
    if best.setting.head_share != trials.frame.equal:
        again = _dealt(trials, best.setting, profile, None)
        settings += [_cheapest(trials, dealt, profile) for dealt in again]
    return _measured(trials, "alphas", settings, best)


def per_layer(trials: Trials, best: Tried, profile: Profile) -> Tried:
    """Measure settings from the profile in which all heads of a layer are alike; return the best.

    A baseline from the same profile by the same steps as `deal` and `alphas`. The gain of a table
    over it is the value of separate heads.
    """
    layers = profile.by_layer()
    return alphas(trials, deal(trials, best, layers), layers)


def _dealt(trials: Trials, setting: Setting, profile: Profile, alpha: int | None) -> list[Setting]:
    """Settings with slots split by the costs at an alpha, or at each head's cheapest (None)."""
    mean = _slots(trials, setting, profile).budget
    # Room in every head for a token that is not protected.
    floor = max(math.ceil(FLOOR * mean), setting.sinks + 2)
    if not floor < mean < profile.length:
        return []
    heads = profile.dealt(mean, floor, alpha).astype(np.float64)
    dealt = np.broadcast_to(heads, (trials.frame.num_layers, trials.frame.num_kv_heads))
    return [replace(setting, head_share=shares((dealt**power).tolist())) for power in POWERS]


def _cheapest(trials: Trials, setting: Setting, profile: Profile, part: int = 1) -> Setting:
    """The setting with the cheapest alphas in the 1 / `part` of heads that gain most."""
    if not trials.feasible(setting):
        return setting
    # If one head represents a whole layer, use its first head; the others are the same.
    heads = slice(profile.costs.shape[1])
    costs = profile.at(np.array(_slots(trials, setting, profile).head_budgets)[:, heads])
    scale = [log_tau_of(alpha) for alpha in profile.alphas]
    alpha = np.array(setting.alpha)[:, heads]
    places = np.vectorize(log_tau_of)(alpha)
    now = np.array(
        [
            np.interp(x, scale, y)
            for x, y in zip(places.flat, costs.reshape(-1, len(scale)), strict=True)
        ]
    ).reshape(places.shape)
    gain = now - costs.min(axis=-1)
    ranks = (-gain).argsort(axis=None, kind="stable").argsort().reshape(gain.shape)
    taken = (gain > 0) & (ranks < -(-gain.size // part))
    chosen = np.where(taken, np.take(profile.alphas, costs.argmin(axis=-1)), alpha)
    whole = np.broadcast_to(chosen, np.shape(setting.alpha))
    return replace(setting, alpha=tuple(map(tuple, whole.tolist())))


def _slots(trials: Trials, setting: Setting, profile: Profile) -> EffectivePolicy:
    return effective(trials.frame.policy(setting), trials.objective.model, profile.length)


def _measured(trials: Trials, batch: str, settings: Sequence[Setting], best: Tried) -> Tried:
    different = [one for one in dict.fromkeys(settings) if one != best.setting]
    feasible = [one for one in different if trials.feasible(one)]
    tried = trials.measure(batch, feasible, best=best)
    better = [one for one in tried if one.gain(best) > 0]
    return min(better, key=lambda one: one.mean, default=best)
