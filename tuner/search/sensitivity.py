"""The sensitivity profile: the cost of each head alone with fewer slots.

Owns the profiled budgets and alphas, and how many examples the time allows. Knows nothing of how a
head's cost is found (`tuner.search.curvature`), how a total is divided (`tuner.search.slot_split`)
or which settings follow from a profile (`tuner.search.profile_stages`).
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from a2sf.model.loader import LoadedModel
from tuner.search import curvature, slot_split
from tuner.search.space import FitSpec, Setting
from tuner.search.trials import Trials

FRACTIONS = (0.15, 0.3, 0.6, 1.0, 1.75, 3.0)
"""Budgets to profile, as multiples of the mean budget, as far as they are below the length."""

ALPHAS = (0.8, 0.93, 0.98, 0.993, 1.0)


MAX_BYTES = 3 * 10**9
"""Approximate memory of the rows that are profiled together; at least one row."""

MAX_ROWS = 8

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

    def split(self, mean: int, floor: int, alpha: int | None) -> NDArray[np.int64]:
        """Split slots by the costs at an alpha of the grid, or at each head's cheapest (None)."""
        costs, noise = self.costs, self.noise
        if alpha is None:
            best = costs.argmin(axis=-1)[..., None]
            costs, noise = (np.take_along_axis(x, best, axis=-1)[..., 0] for x in (costs, noise))
        else:
            costs, noise = costs[..., alpha], noise[..., alpha]
        return slot_split.split_by_cost(
            costs, self.budgets, mean=mean, floor=floor, max_slots=self.length, noise=noise
        )

    def at(self, slots: NDArray[np.float64]) -> NDArray[np.float64]:
        """Costs of each head at its slots, by alpha: [num_layers, num_kv_heads, alphas]."""
        whole = np.clip(np.rint(slots), 1, self.length).astype(int)
        curves = np.stack(
            [
                slot_split.predict_costs(
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


def measure_profile(trials: Trials, best: Setting) -> Profile | None:
    """Make the profile with the protection of `best`; None if there is no time for any example.

    Args:
        trials: knows the remaining time, and stores results.
        best: the setting whose protection is used.
    """
    spec, model, examples = trials.spec, trials.objective.model, trials.objective.examples
    lengths = [len(example.token_ids) for example in examples]
    length = round(float(np.mean(lengths)))
    budgets = _budgets_to_profile(trials, best, length)
    if not budgets or trials.trials_left == 0:
        return None
    alphas = tuple(sorted({*ALPHAS, best.alpha[0][0]}))
    policies = [
        at.policy(replace(best.with_all(alpha), head_share=spec.equal))
        for at, _ in budgets
        for alpha in alphas
    ]
    content = json.dumps([policy.model_dump(mode="json") for policy in policies], sort_keys=True)
    name = f"look {hashlib.sha256(content.encode()).hexdigest()[:16]}"
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    batch_size = _batch_size(model, lengths)
    rows = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    began = trials.seconds_spent
    until = began + TIME_SHARE * trials.stage_seconds_left
    sums: list[NDArray[np.float64]] = []
    count = 0
    ticks = 0
    begun = 0.0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        share = ticks / (len(rows) * curvature.ticks(model))
        trials.show(f"profiling every head, {share:.0%}", time.perf_counter() - begun)

    def make(batch: list[int]) -> tuple[Any, float]:
        nonlocal begun
        begun = time.perf_counter()
        texts = [examples[row] for row in batch]
        found = curvature.effects(model, texts, policies, tick)
        costs = (found.square().mean(dim=1) / 2).numpy()
        figures = np.stack([costs.sum(axis=0), np.square(costs).sum(axis=0)])
        return _digits(figures), curvature.work(len(policies)) * len(batch) / len(examples)

    # In random order, because the examples within the time should represent all of them.
    for number in np.random.default_rng(0).permutation(len(rows)).tolist():
        share = len(rows[number]) / len(examples)
        need = curvature.work(len(policies)) * share * trials.seconds_per_row * len(examples)
        if count:
            need = (trials.seconds_spent - began) / count * len(rows[number])
        if trials.seconds_spent + need > until:
            note = (
                f"The sensitivity profile uses {count} of {len(examples)} examples: more "
                "--minutes make it more certain."
                if count
                else "There was no time for the sensitivity profile: it needs more --minutes."
            )
            trials.limits.add("--minutes")
            # Both stages that need a profile may find no time for it.
            if note not in trials.notes:
                trials.notes.append(note)
            break
        key = f"{name}/{number}"
        sums.append(np.array(trials.compute_once(key, partial(make, rows[number]))))
        count += len(rows[number])
        ticks = len(sums) * curvature.ticks(model)
    if not count:
        return None
    mean, square = sum(sums[1:], start=sums[0]) / count
    error = np.sqrt(np.maximum(square - mean**2, 0.0) / max(count - 1, 1))
    shape = (*mean.shape[:2], len(budgets), len(alphas))
    return Profile(
        length=length,
        budgets=tuple(slots for _, slots in budgets),
        alphas=alphas,
        costs=mean.reshape(shape),
        noise=error.reshape(shape),
        examples=count,
    )


def _budgets_to_profile(trials: Trials, best: Setting, length: int) -> list[tuple[FitSpec, int]]:
    """The budgets to profile: as a fit's spec, and in slots of a typical example."""
    spec, found = trials.spec, {}
    for fraction in FRACTIONS:
        ratio = None if spec.budget_ratio is None else fraction * spec.budget_ratio
        budget = None if spec.budget is None else round(fraction * spec.budget)
        at = replace(spec, budget=budget, budget_ratio=ratio)
        slots = budget if ratio is None else round(ratio * length)
        assert slots is not None
        if (ratio is None or ratio < 1) and slots < length and trials.feasible(best, at):
            found[slots] = at
    return [(at, slots) for slots, at in sorted(found.items())]


def _batch_size(model: LoadedModel, lengths: Sequence[int]) -> int:
    """Approximate number of examples that fit into MAX_BYTES together."""
    config = model.module.config
    hidden, inner = config.hidden_size, config.intermediate_size
    numbers = max(lengths) * (
        model.shape.num_layers * ((10 + curvature.SAMPLES) * hidden + 3 * inner)
        + 6 * config.vocab_size
    )
    return max(1, min(MAX_ROWS, MAX_BYTES // (4 * int(numbers))))


def _digits(values: NDArray[np.float64]) -> Any:
    """Nested lists of numbers rounded to five digits, for storage in a study."""
    rounded = np.array([float(f"{value:.5g}") for value in values.flat])
    return rounded.reshape(values.shape).tolist()
