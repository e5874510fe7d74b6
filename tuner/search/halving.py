"""Successive halving: many settings on few examples, then the best of them on more.

Owns the rounds and their sizes. Knows nothing of how settings are proposed or measured.
"""

from collections.abc import Sequence

import numpy as np

from tuner.search.results import TrialResult
from tuner.search.space import Setting
from tuner.search.trials import Trials

MIN_TO_HALVE = 5
"""Up to this number, settings are measured on all examples; halving them would need more trials."""


def successive_halving(
    trials: Trials,
    batch: str,
    settings: Sequence[Setting],
    max_trials: int,
    share: float = 1.0,
    *,
    min_settings: int = 0,
) -> list[TrialResult]:
    """Measure many settings on few examples, and fewer and fewer settings on more examples.

    If trials or time are short, only the first settings are measured, so order them by priority.

    Args:
        trials: measures.
        batch: the batch's name.
        settings: what to measure.
        max_trials: of all rounds together.
        share: of the stage's remaining time.
        min_settings: number of settings of each round that are measured even after the time is
            over.

    Returns:
        The settings measured on all examples, cheapest first.
    """
    count = len(trials.objective.examples)
    max_trials = min(max_trials, trials.trials_left)
    fitting = (
        n for n in range(len(settings), 0, -1) if _total_trials(rungs(n, count)) <= max_trials
    )
    rounds = rungs(next(fitting, 0), count)
    work = np.cumsum([kept * examples for kept, examples in rounds])
    began, seconds = trials.seconds_spent, share * trials.stage_seconds_left
    results: list[TrialResult] = []
    reached = 1.0
    for number, (kept, examples) in enumerate(rounds):
        results = trials.measure(
            f"{batch}/{examples}",
            [one.setting for one in results] if number else settings,
            examples=examples,
            max_settings=max(1, round(reached * kept)),
            min_settings=min_settings,
            deadline=began + seconds * float(work[number] / work[-1]),
        )
        results.sort(key=lambda one: one.mean)
        if number == 0:
            reached = len(results) / kept
    return [one for one in results if len(one.kl) == count]


def rungs(settings: int, examples: int) -> list[tuple[int, int]]:
    """Rounds of halving: all settings, a fifth of them, then a third of those on all examples.

    Each round is a pair: the number of settings, and the number of examples, counted from the
    first. With few examples there are fewer rounds, because each must use more examples than the
    one before. Few settings have one round.
    """
    if settings <= MIN_TO_HALVE:
        return [(settings, examples)] if settings else []
    planned = [
        (settings, max(2, examples // 4)),
        (max(settings // 5, 2), max(2, examples // 2)),
        (max(settings // 15, 1), examples),
    ]
    return [
        rung
        for number, rung in enumerate(planned)
        if all(rung[1] > earlier for _, earlier in planned[:number])
    ]


def _total_trials(rounds: Sequence[tuple[int, int]]) -> int:
    return sum(kept for kept, _ in rounds)
