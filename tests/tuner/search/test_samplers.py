"""General optimisers: their spaces mean the settings that they should, and they find something."""

from dataclasses import replace
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from a2sf.schema import UniformSetting
from tests.tuner.planted import SPEC, Planted, table, trials_of
from tuner.search import samplers
from tuner.search.moves import CoordinateSearch
from tuner.search.samplers import Space, by_layer, every_head
from tuner.search.space import Setting

START = SPEC.uniform(UniformSetting(alpha=0.9, recent_share=0.25, sinks=4))
UNLIKE = table((0.0, 0.5), (0.95, 0.99), (1.0, 0.3), share=(0.5, 2.0, 0.5))
LAYERS = table((0.0, 0.0), (0.95, 0.95), (1.0, 1.0), share=(0.5, 2.0, 0.5))


@pytest.mark.parametrize(
    ("space", "best"),
    [
        (every_head(UNLIKE), UNLIKE),
        (by_layer(LAYERS), LAYERS),
        (by_layer(START), START),
    ],
)
def test_the_start_of_a_space_represents_the_best_setting(space: Space, best: object) -> None:
    assert space.start.keys() == space.ranges.keys()
    assert all(
        space.ranges[n][0] <= value <= space.ranges[n][1] for n, value in space.start.items()
    )
    assert space.setting(space.start) == best


def test_a_start_outside_its_range_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^log_tau\.0 starts at 9; accepted: 0 to 7"):
        Space({"log_tau.0": (0.0, 7.0)}, {"log_tau.0": 9.0}, lambda _: START)


FAR = replace(LAYERS, head_share=((0.05,) * 2, (2.9,) * 2, (0.05,) * 2), sinks=11)


def test_a_best_setting_outside_the_ranges_is_replaced_by_the_nearest_and_noted() -> None:
    climb = run("cma", Planted(FAR), most=6, start=FAR)
    (note,) = climb.trials.notes
    assert note.startswith("The stage cma starts at the nearest setting within its ranges: ")
    assert "sinks at 8, not 11" in note
    assert "at -3, not -4.32193" in note


def test_a_start_that_differs_from_the_best_setting_is_measured_first() -> None:
    # The scale has no alpha between its last one below 1 and 1.
    planted = Planted(LAYERS)
    run("tpe", planted, most=6, start=START.with_all(0.9999))
    assert planted.calls[1][0].alpha == START.with_all(1.0).alpha


def run(
    name: str, planted: Planted, most: int = 60, storage: Any = None, start: Setting = START
) -> CoordinateSearch:
    trials = trials_of(planted, storage)
    with trials.stage("start", 1):
        (known,) = trials.measure("start", [start])
    climb = CoordinateSearch(trials, known)
    with trials.stage(name, most):
        getattr(samplers, name)(climb, 0)
        assert trials.trials_left == 0
    return climb


@pytest.mark.parametrize("name", ["tpe", "cma"])
def test_a_sampler_gains_on_the_start_and_proposes_the_same_again(name: str) -> None:
    target = {"tpe": replace(UNLIKE, head_share=START.head_share)}.get(name, LAYERS)
    storage = InMemoryStorage()
    planted = Planted(target)
    best = run(name, planted, storage=storage).best
    assert planted.exact(best.setting) < 0.8 * planted.exact(START)
    again = Planted(target)
    assert run(name, again, storage=storage).best.setting == best.setting
    assert again.calls == []


def test_proposals_that_leave_a_layer_nothing_are_never_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = Planted(LAYERS)
    trials = trials_of(planted)
    with trials.stage("start", 1):
        (start,) = trials.measure("start", [START])
    monkeypatch.setattr(type(trials), "feasible", lambda *_: False)
    with trials.stage("cma", 9):
        samplers.cma(CoordinateSearch(trials, start), 0)
        assert trials.trials_left == 9
