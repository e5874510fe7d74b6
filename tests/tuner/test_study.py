"""What is kept between runs: stage one, finished tables, and for what the study was made."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from a2sf.errors import InvalidArgument
from a2sf.schema import TablePolicy
from tuner.objective import Cost
from tuner.search import Frame, Uniform
from tuner.study import CHUNK, Fit, open_storage

FRAME = Frame(num_layers=2, num_kv_heads=2, budget=None, budget_ratio=0.2, prefill_chunk=0)
DEFINITION: dict[str, Any] = {"seed": 0, "dataset": "x", "budget_ratio": 0.2}
SETTING = Uniform(alpha=0.9, recent_share=0.25, sinks=4)
EXAMPLES = 2 * CHUNK


@pytest.fixture(autouse=True)
def _quiet_optuna() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def storage(tmp_path: Path) -> BaseStorage:
    return open_storage(None, tmp_path / "x.journal")[0]


def cost(value: float, examples: int = EXAMPLES) -> Cost:
    kl = value + 0.001 * np.arange(examples)
    return Cost(kl=kl, nll=kl + 1)


def settled(storage: BaseStorage, **definition: Any) -> Fit:
    fit = Fit(storage, "x", FRAME, {**DEFINITION, **definition})
    fit.settle(SETTING, cost(0.5))
    return fit


class Better:
    """Costs that fall with every call, so that each table is the best so far."""

    def __init__(self) -> None:
        self.calls: list[tuple[TablePolicy, range]] = []

    def __call__(self, table: TablePolicy, part: range) -> Cost:
        self.calls.append((table, part))
        values = 0.4 - 0.001 * len(self.calls) + 0.001 * np.array(part)
        return Cost(kl=values, nll=values)


def test_trials_are_counted_over_runs_and_the_start_is_the_first(storage: BaseStorage) -> None:
    measure = Better()
    settled(storage).run(4, EXAMPLES, measure)
    # The start's cost is known from stage one; each other table takes two looks.
    assert len(measure.calls) == 2 * 3
    fit = Fit(storage, "x", FRAME, DEFINITION)
    fit.run(4, EXAMPLES, measure)
    assert (fit.finished, len(measure.calls)) == (4, 2 * 3)
    fit.run(6, EXAMPLES, measure)
    assert (fit.finished, len(measure.calls)) == (6, 2 * 5)


def test_a_table_is_tried_with_the_protection_of_the_best_uniform_setting(
    storage: BaseStorage,
) -> None:
    measure = Better()
    settled(storage).run(3, EXAMPLES, measure)
    for table, _ in measure.calls:
        assert (table.recent_share, table.sinks, table.budget_ratio) == (0.25, 4, 0.2)
        assert table.alpha != FRAME.uniform(SETTING).alpha


def test_the_best_table_is_the_one_that_cost_least_and_the_start_if_none_did(
    storage: BaseStorage,
) -> None:
    fit = settled(storage)
    fit.run(1, EXAMPLES, Better())
    assert fit.best()[0] == FRAME.uniform(SETTING).alpha
    measure = Better()
    fit.run(3, EXAMPLES, measure)
    assert fit.best()[0] == measure.calls[-1][0].alpha


def test_a_table_that_is_worse_on_every_example_is_given_up_half_way(
    storage: BaseStorage,
) -> None:
    looks = []

    def worse(_: TablePolicy, part: range) -> Cost:
        looks.append(part)
        values = 0.9 + 0.001 * np.array(part)
        return Cost(kl=values, nll=values)

    fit = settled(storage)
    fit.run(3, EXAMPLES, worse)
    assert looks == [range(CHUNK), range(CHUNK)]
    states = [t.state for t in optuna.load_study(study_name="x", storage=storage).get_trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert (fit.finished, fit.best()[0]) == (3, FRAME.uniform(SETTING).alpha)


def test_a_setting_measured_before_is_not_measured_again(storage: BaseStorage) -> None:
    measured: list[Uniform] = []

    def measure(new: Sequence[Uniform]) -> Iterable[Cost]:
        for setting in new:
            measured.append(setting)
            yield cost(setting.alpha, 4)

    settings = [Uniform(alpha, 0.25, 4) for alpha in (0.0, 0.5, 1.0)]
    fit = Fit(storage, "x", FRAME, DEFINITION)
    # A run that ends after two settings, as if killed.
    interrupted = fit.measured(settings, 4, measure)
    firsts = [next(interrupted), next(interrupted)]
    costs = list(Fit(storage, "x", FRAME, DEFINITION).measured(settings, 4, measure))
    assert measured == settings
    assert [c.mean for c in costs[:2]] == [c.mean for c in firsts]
    np.testing.assert_array_equal(costs[0].nll, cost(0.0, 4).nll)
    # The same settings on more examples are another matter.
    assert len(list(fit.measured(settings, 5, measure))) == 3
    assert len(measured) == 6


def test_stage_one_once_settled_stays(storage: BaseStorage) -> None:
    settled(storage)
    kept = Fit(storage, "x", FRAME, DEFINITION).uniform
    assert kept is not None
    assert kept[0] == SETTING
    np.testing.assert_array_equal(kept[1].kl, cost(0.5).kl)


def test_a_study_of_another_fit_is_refused_with_what_differs(storage: BaseStorage) -> None:
    settled(storage)
    with pytest.raises(InvalidArgument, match=r"'x'.*budget_ratio is 0\.2 there and 0\.3 here"):
        Fit(storage, "x", FRAME, {**DEFINITION, "budget_ratio": 0.3})
    # Another name in the same storage is another study.
    assert Fit(storage, "y", FRAME, {**DEFINITION, "budget_ratio": 0.3}).uniform is None


def test_an_interrupted_trial_is_not_counted(storage: BaseStorage) -> None:
    def interrupted(_: TablePolicy, part: range) -> Cost:
        raise KeyboardInterrupt

    fit = settled(storage)
    with pytest.raises(KeyboardInterrupt):
        fit.run(3, EXAMPLES, interrupted)
    assert fit.finished == 1
    fit.run(3, EXAMPLES, Better())
    assert fit.finished == 3


def test_a_database_serves_as_well_as_a_journal(tmp_path: Path) -> None:
    storage, kind = open_storage(f"sqlite:///{tmp_path}/x.db", tmp_path / "unused.journal")
    assert kind == "sqlite"
    fit = settled(storage)
    fit.run(3, EXAMPLES, Better())
    assert fit.finished == 3
    assert not (tmp_path / "unused.journal").exists()


def test_a_storage_that_cannot_be_opened_is_told_without_its_address(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'nosuch' storage cannot be opened") as caught:
        open_storage("nosuch://me:secret@host/db", tmp_path / "x.journal")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", ["not a journal\n\n", '{"op_code": 99}\n', "[1]\n"])
def test_a_file_that_is_no_journal_is_told_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.journal").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"x\.journal is not a whole journal"):
        open_storage(None, tmp_path / "x.journal")


def test_the_time_spent_is_summed_over_runs(storage: BaseStorage) -> None:
    fit = settled(storage)
    fit.run(2, EXAMPLES, Better())
    after_one = fit.seconds
    assert after_one > 0
    fit.run(4, EXAMPLES, Better())
    assert fit.seconds > after_one
