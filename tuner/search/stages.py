"""Runs the stages of a search, in order.

Owns the shares of the trials and of the time that each stage may take, and when the baseline
`per layer` is searched. Knows nothing of data, of the proof or of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from a2sf.schema import UniformSetting
from tuner.search import profile_stages, samplers, sensitivity
from tuner.search.moves import CoordinateSearch
from tuner.search.results import StageTotals, TrialResult
from tuner.search.trials import Trials
from tuner.search.uniform import best_uniform
from tuner.settings import OPEN_ENDED_STAGES, PER_LAYER

PER_LAYER_TIME_SHARE = 0.2
"""Share of the search time that is left which the baseline `per layer` may use. It runs before the
later stages of the table, and must not take their time."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    uniform: UniformSetting
    bests: dict[str, TrialResult]
    """The best setting after each stage, in order; `uniform` is the first."""
    per_layer: TrialResult | None
    """The best setting with one share of the slots and one alpha per layer; None if none was
    measured."""
    stage_totals: dict[str, StageTotals]

    @property
    def best(self) -> TrialResult:
        """The best setting of all stages."""
        return list(self.bests.values())[-1]


def search(
    trials: Trials,
    stages: Sequence[str],
    max_trials: int,
    seed: int,
) -> SearchResult:
    """Find the best uniform setting with at most half of the trials; improve it with the rest."""
    uniform, best = best_uniform(trials, max_trials // 2)
    rest = max(max_trials - trials.stage_totals["uniform"].trials, 0)
    found, per_layer = run_stages(trials, best, stages, rest, seed)
    return SearchResult(uniform, {"uniform": best, **found}, per_layer, trials.stage_totals)


def run_stages(
    trials: Trials,
    best: TrialResult,
    stages: Sequence[str],
    max_trials: int,
    seed: int,
) -> tuple[dict[str, TrialResult], TrialResult | None]:
    """Run the stages; return the best setting after each, and the best setting by layers.

    The best by layers is a baseline for the proof. It is searched once the heads are profiled.

    Args:
        trials: measures settings.
        best: the start.
        stages: names of STAGES, in order.
        max_trials: of all stages together. Stages that end only with the trials share equally the
            trials and the time that are left.
        seed: for random draws, which only `tpe` and `cma` make.
    """
    bests = {}
    start, per_layer = best, None
    coordinate_search = CoordinateSearch(trials, best)
    profile: sensitivity.Profile | None = None
    for number, name in enumerate(stages):
        sharing = (
            sum(stage in OPEN_ENDED_STAGES for stage in stages[number:])
            if name in OPEN_ENDED_STAGES
            else 1
        )
        with trials.stage(name, max_trials // sharing, 1 / sharing):
            match name:
                case "sensitivity" | "alphas":
                    profile = profile or sensitivity.measure_profile(
                        trials, coordinate_search.best.setting
                    )
                    if profile is not None:
                        stage = (
                            profile_stages.split_by_profile
                            if name == "sensitivity"
                            else profile_stages.alphas
                        )
                        coordinate_search.best = stage(trials, coordinate_search.best, profile)
                case "tpe":
                    samplers.tpe(coordinate_search, seed)
                case "cma":
                    samplers.cma(coordinate_search, seed)
                case _:
                    getattr(coordinate_search, name)()
        max_trials -= trials.stage_totals[name].trials
        bests[name] = coordinate_search.best
        if profile is not None and PER_LAYER not in trials.stage_totals:
            per_layer = _best_per_layer(trials, start, profile, max_trials)
            max_trials -= trials.stage_totals[PER_LAYER].trials
    return bests, per_layer


def _best_per_layer(
    trials: Trials, start: TrialResult, profile: sensitivity.Profile, max_trials: int
) -> TrialResult | None:
    """Search the best setting by layers; None if neither trials nor time suffice for any."""
    with trials.stage(
        PER_LAYER, min(max_trials, profile_stages.MAX_PROPOSALS + 1), PER_LAYER_TIME_SHARE
    ):
        found = profile_stages.search_per_layer(trials, start, profile)
        whole = trials.trials_left > 0
    count = trials.stage_totals[PER_LAYER].trials
    if whole:
        return found
    trials.notes.append(
        f"The search for the best setting by layers ended after {count} "
        f"trial{'s' * (count > 1)}: more --trials or --minutes may make this baseline stronger."
        if count
        else "No setting by layers was measured: more --trials or --minutes would add this "
        "baseline."
    )
    return found if count else None
