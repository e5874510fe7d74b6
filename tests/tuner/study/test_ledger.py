"""The memory of a fit: what was measured is replayed, and nothing counts twice."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tenacity import wait_none

from a2sf.errors import InvalidArgument, Unavailable
from tests.tuner.crew import opened
from tuner.study.ledger import Ledger, Timing
from tuner.study.records import PointCost
from tuner.study.storage import KernelLock

DEFINITION: dict[str, Any] = {"seed": 0, "heads": (2, 2), "budget_ratio": 0.2}
POINTS = [{"alpha": [0.5, 0.25 * index], "examples": 3} for index in range(4)]
PACE = Timing(poll=0.01, lease_period=0.05, lease_grace=5.0, max_outage=0.5)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "x.journal"


@pytest.fixture(params=["journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    journal = request.param == "journal"
    with opened(tmp_path / "x.journal" if journal else f"sqlite:///{tmp_path}/x.db") as made:
        yield made


def ledger_of(storage: BaseStorage, name: str = "x", **definition: Any) -> Ledger:
    return Ledger(storage, name, {**DEFINITION, **definition}, PACE)


def cost(index: int, _: dict[str, Any] | None = None) -> PointCost:
    """The second point is given up early."""
    kl = [0.1 * index, 0.1 * index + 0.2] + ([] if index == 1 else [0.1 * index + 0.1])
    return PointCost(kl=kl, nll=[k + 1 for k in kl], evaluations=0.5, pruned=index == 1)


def never(index: int, _: dict[str, Any]) -> PointCost:
    raise AssertionError(f"point {index} is measured again")


def timeless(found: Sequence[PointCost]) -> list[tuple[list[float], list[float], float, bool]]:
    return [(one.kl, one.nll, one.evaluations, one.pruned) for one in found]


EXPECTED = timeless([cost(index) for index in range(4)])


def test_a_finished_batch_is_read_from_the_study_by_later_calls(storage: BaseStorage) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []

    def measure(index: int, point: dict[str, Any]) -> PointCost:
        seen.append((index, point))
        return cost(index)

    first = ledger_of(storage).measure("start", POINTS, measure)
    assert seen == list(enumerate(POINTS))
    assert timeless(first) == EXPECTED
    assert all(one.seconds > 0 for one in first)
    again = ledger_of(storage)
    assert again.measure("start", POINTS, never) == first
    assert again.measure("none", [], never) == []
    # The same points in another batch are other points.
    assert timeless(again.measure("next", POINTS, cost)) == EXPECTED


def test_unfinished_batches_are_continued(storage: BaseStorage) -> None:
    def two(index: int, point: dict[str, Any]) -> PointCost:
        if index == 2:
            raise KeyboardInterrupt
        return cost(index)

    ledger = ledger_of(storage)
    with pytest.raises(KeyboardInterrupt):
        ledger.measure("start", POINTS, two)
    assert timeless(list(ledger.of("start").values())) == EXPECTED[:2]
    measured: list[int] = []

    def rest(index: int, point: dict[str, Any]) -> PointCost:
        measured.append(index)
        return cost(index)

    reported: list[PointCost] = []
    found = ledger_of(storage).measure("start", POINTS, rest, reported.append)
    assert measured == [2, 3]
    assert timeless(found) == EXPECTED
    # Each is told once, those of before too.
    assert reported == found


def test_an_error_while_measuring_frees_the_point_at_once(storage: BaseStorage) -> None:
    def broken(index: int, point: dict[str, Any]) -> PointCost:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ledger_of(storage).measure("start", POINTS, broken)
    study = optuna.load_study(study_name="x", storage=storage)
    assert not study.get_trials(states=[TrialState.RUNNING])
    assert ledger_of(storage).trials == 0


def test_a_mean_that_is_not_finite_is_refused(storage: BaseStorage) -> None:
    def broken(index: int, point: dict[str, Any]) -> PointCost:
        return PointCost(kl=[float("nan")], nll=[0.0], evaluations=1.0)

    with pytest.raises(ValueError, match="mean KL of nan nats"):
        ledger_of(storage).measure("start", POINTS, broken)
    assert ledger_of(storage).trials == 0


def test_sums_cover_finished_measurements_only(storage: BaseStorage) -> None:
    ledger = ledger_of(storage)
    assert (ledger.trials, ledger.evaluations, ledger.seconds) == (0, 0, 0)
    found = ledger.measure("start", POINTS, cost)
    ledger.decide_once("stop", True)
    assert (ledger.trials, ledger.evaluations) == (4, 2.0)
    assert ledger.seconds == pytest.approx(sum(one.seconds for one in found))
    assert ledger.of("start") == dict(enumerate(found))
    assert ledger.of("next") == {}
    assert ledger_of(storage, "y").trials == 0


def test_optuna_can_read_the_study(storage: BaseStorage) -> None:
    ledger_of(storage).measure("start", POINTS, cost)
    study = optuna.load_study(study_name="x", storage=storage)
    trials = [trial for trial in study.trials if "index" in trial.user_attrs]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert [trial.value for trial in trials] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert study.best_trial.user_attrs["point"] == POINTS[0]
    assert not study.best_trial.params


# What the study is of ------------------------------------------------------------------------


def test_a_batch_with_other_points_is_refused(storage: BaseStorage) -> None:
    ledger = ledger_of(storage)
    ledger.measure("start", POINTS, cost)
    for others in (POINTS[:3], [*POINTS, {"alpha": []}], [*POINTS[:3], {"alpha": [1]}]):
        with pytest.raises(InvalidArgument, match=r"'start' of 'x'.*other points"):
            ledger.measure("start", others, never)


def test_a_study_of_another_fit_is_refused_with_the_difference(storage: BaseStorage) -> None:
    ledger_of(storage)
    ledger_of(storage)
    with pytest.raises(InvalidArgument, match=r"'x'.*budget_ratio is 0\.2 there and 0\.3 here"):
        ledger_of(storage, budget_ratio=0.3)
    with pytest.raises(InvalidArgument, match=r"'x'.*length is None there and 5 here"):
        ledger_of(storage, length=5)
    # Another name in the same storage is another study.
    ledger_of(storage, "y", budget_ratio=0.3)


def test_the_first_to_settle_decides(storage: BaseStorage) -> None:
    ledger, other = ledger_of(storage), ledger_of(storage)
    assert other.decided("stop") is None
    assert ledger.decide_once("stop", {"after": 3}) == {"after": 3}
    assert other.decided("stop") == {"after": 3}
    assert other.decide_once("stop", {"after": 4}) == {"after": 3}
    assert other.decide_once("nothing", None) is None
    assert ledger.decide_once("nothing", 1) is None
    assert ledger_of(storage, "y").decide_once("stop", 5) == 5


# Many workers --------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_colliding_workers_measure_every_point_once(journal: Path) -> None:
    points = [{"x": x} for x in range(30)]
    measured: list[int] = []
    found: list[Any] = []
    ready = threading.Barrier(4)

    def work(_: int) -> None:
        with opened(journal) as storage:
            ledger = ledger_of(storage)
            ready.wait()

            def measure(index: int, point: dict[str, Any]) -> PointCost:
                measured.append(index)
                return cost(index)

            found.append(ledger.measure("start", points, measure))

    in_threads(4, work)
    assert Counter(measured) == Counter(range(30))
    assert found == [found[0]] * 4


def test_of_many_simultaneous_decisions_one_counts(journal: Path) -> None:
    decided: list[list[int]] = []
    ready = threading.Barrier(4)

    def work(number: int) -> None:
        with opened(journal) as storage:
            ledger = ledger_of(storage)
            ready.wait()
            decided.append([ledger.decide_once(f"{key}", number) for key in range(10)])

    in_threads(4, work)
    assert decided == [decided[0]] * 4


class Overtaken(JournalStorage):
    """A storage in which something happens just before the next trial is born."""

    before: Callable[[], object] | None = None

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        happens, self.before = self.before, None
        if happens is not None:
            happens()
        return super().create_new_trial(study_id, template_trial)


def test_a_worker_that_finds_its_point_taken_withdraws(journal: Path) -> None:
    with opened(journal) as storage:
        other = ledger_of(storage)
        late = Overtaken(JournalFileBackend(str(journal), KernelLock(str(journal))))
        ledger = ledger_of(late)
        # Both saw the first point free; the other takes it first, and ends the whole batch.
        late.before = lambda: other.measure("start", POINTS, cost)
        assert timeless(ledger.measure("start", POINTS, never)) == EXPECTED
        assert other.trials == 4


def test_a_worker_given_up_by_mistake_counts_nothing_twice(journal: Path) -> None:
    with opened(journal) as storage, opened(journal) as elsewhere:
        ledger, other = ledger_of(storage), ledger_of(elsewhere)

        def measure(index: int, point: dict[str, Any]) -> PointCost:
            if index > 0:
                return never(index, point)
            (mine,) = elsewhere.get_all_trials(0, states=[TrialState.RUNNING])
            number = elsewhere.get_trial_id_from_study_id_trial_number(0, mine.number)
            elsewhere.set_trial_state_values(number, TrialState.FAIL)
            other.measure("start", POINTS, cost)
            return PointCost(kl=[9.0], nll=[9.0], evaluations=9.0)

        assert timeless(ledger.measure("start", POINTS, measure)) == EXPECTED
        assert (ledger.trials, ledger.evaluations) == (4, 2.0)


# Storages that fail --------------------------------------------------------------------------


class Broken(JournalStorage):
    """A storage whose every other write fails: before it is made, or after, its answer lost."""

    writes = 0

    def __init__(self, journal: Path, *, lost_answers: bool) -> None:
        super().__init__(JournalFileBackend(str(journal), KernelLock(str(journal))))
        self._lost_answers = lost_answers

    def _write_log(self, op_code: int, extra_fields: dict[str, Any]) -> None:
        self.writes += 1
        fails = self.writes % 2 == 0
        if fails and not self._lost_answers:
            raise ConnectionResetError
        super()._write_log(op_code, extra_fields)
        if fails:
            self._sync_with_backend()
            raise ConnectionResetError


@pytest.mark.parametrize("lost_answers", [False, True])
def test_failed_calls_and_lost_answers_measure_nothing_twice(
    journal: Path,
    lost_answers: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tuner.study.storage.wait_random_exponential", lambda **_: wait_none())
    storage = Broken(journal, lost_answers=lost_answers)
    ledger = ledger_of(storage)
    measured: list[int] = []

    def measure(index: int, point: dict[str, Any]) -> PointCost:
        measured.append(index)
        return cost(index)

    for batch in range(4):
        assert timeless(ledger.measure(f"batch {batch}", POINTS, measure)) == EXPECTED
    assert Counter(measured) == dict.fromkeys(range(4), 4)
    assert ledger.decide_once("stop", 1) == 1
    assert ledger.decide_once("stop", 2) == 1
    assert (ledger.trials, ledger.evaluations) == (16, 8.0)
    assert not storage.get_all_trials(0, states=[TrialState.RUNNING])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 * said.count("the storage of study 'x' is back")


def test_a_storage_that_stays_away_ends_in_one_sentence(
    journal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(journal) as storage:
        ledger = ledger_of(storage)

        def away(*_: Any, **__: Any) -> int:
            raise ConnectionRefusedError("postgresql://me:secret@host/db")

        def measure(index: int, point: dict[str, Any]) -> PointCost:
            for name in ("set_trial_user_attr", "set_trial_state_values", "create_new_trial"):
                monkeypatch.setattr(storage, name, away)
            return cost(index)

        with pytest.raises(Unavailable, match=r"'x' has not answered for 0\.5 s.*run the same"):
            ledger.measure("start", POINTS, measure)
        monkeypatch.undo()
        said = capsys.readouterr().err
        assert said == "the storage of study 'x' does not answer; waiting up to 0.5 s\n"
        # The point that it held is its own, and free as soon as it looks again.
        assert timeless(ledger.measure("start", POINTS, cost)) == EXPECTED
