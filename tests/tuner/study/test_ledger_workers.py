"""Many processes, one fit: work is shared, and none is lost or done twice, whoever dies."""

import random
import signal
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.tuner.crew import (
    EVERY_POINT,
    assert_sound,
    crew,
    opened,
    timeless,
    undisturbed,
    wait_for,
)
from tests.tuner.ledger_worker import BATCHES, POINTS
from tuner.study.ledger import Ledger


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_batches_and_find_the_same(tmp_path: Path, workers: int) -> None:
    journal = tmp_path / "x.journal"
    with crew(journal, tmp_path / "notes", 0.15) as team:
        team.start(workers)
        pids = {worker.pid for worker in team.workers}
        result = team.join()
        events = team.events()
        assert sorted(team.points("begun")) == EVERY_POINT
        assert len({pid for *_, pid in events}) == workers
        # Nobody passes a batch before its last point is measured.
        for number in range(BATCHES):
            kinds = [kind for kind, batch, *_ in events if batch == number]
            assert kinds[: 2 * POINTS].count("ended") == POINTS
            assert kinds[2 * POINTS :] == ["passed"] * workers
    assert timeless(result["found"]) == undisturbed(tmp_path / "alone")
    assert result["decided"] in pids
    assert_sound(journal)
    with opened(journal) as storage:
        failed = storage.get_all_trials(0, states=[TrialState.FAIL])
    surplus = [trial for trial in failed if "index" in trial.user_attrs]
    assert len(surplus) <= len(EVERY_POINT) / 2


def test_the_point_of_a_killed_worker_is_measured_by_another(tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    with crew(journal, tmp_path / "notes", 0.2) as team:
        team.start(3)
        victim = team.workers[0]
        wait_for(lambda: team.busy(victim))
        team.stop(victim)
        team.kill(victim)
        lost = team.points("begun", victim.pid)[-1]
        result = team.join()
        assert sorted(team.points("begun")) == sorted([*EVERY_POINT, lost])
    assert timeless(result["found"]) == undisturbed(tmp_path / "alone")
    assert_sound(journal)


def test_killed_and_resumed_workers_find_the_same_as_an_undisturbed_worker(
    tmp_path: Path,
) -> None:
    journal = tmp_path / "x.journal"
    with crew(journal, tmp_path / "notes", 0.1) as team:
        team.start(2)
        wait_for(lambda: len(team.points("ended")) > POINTS)
        for worker in list(team.workers):
            team.kill(worker)
        with opened(journal) as storage:
            finished = Ledger(storage, "s", {"seed": 0}).trials
        begun = len(team.points("begun"))
        team.start()
        result = team.join()
        again = len(team.points("begun")) - begun
        assert again == len(EVERY_POINT) - finished
    assert timeless(result["found"]) == undisturbed(tmp_path / "alone")
    assert_sound(journal)


def test_a_worker_stopped_beyond_the_grace_counts_nothing_twice(tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    with crew(journal, tmp_path / "notes", 0.2) as team:
        team.start(2)
        sleeper, other = team.workers
        wait_for(lambda: team.busy(sleeper))
        team.stop(sleeper)
        assert other.wait(60) == 0
        taken_over = len(team.points("begun"))
        assert taken_over == len(EVERY_POINT) + 1
        sleeper.send_signal(signal.SIGCONT)
        result = team.join()
        # It ends its point, is refused, and has nothing left to do.
        assert len(team.points("begun")) == taken_over
    assert timeless(result["found"]) == undisturbed(tmp_path / "alone")
    assert_sound(journal)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_a_study_that_others_end(tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    moments = random.Random(0)
    with crew(journal, tmp_path / "notes", 0.3) as team:
        team.start(2)
        for _ in range(20):
            time.sleep(moments.uniform(0.3, 1.2))
            running = [worker for worker in team.workers if worker.poll() is None]
            if not running:
                # Everything is measured: kill those who replay it.
                team.start(2)
                continue
            team.kill(moments.choice(running))
            team.start()
        result = team.join()
        # None who ended was killed, and each killed one had at most one point in its hands.
        assert len(team.points("begun")) <= len(EVERY_POINT) + 20
    assert timeless(result["found"]) == undisturbed(tmp_path / "alone")
    assert_sound(journal)


@pytest.mark.slow
def test_a_database_in_a_file_serves_as_well_as_a_journal(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/x.db"
    with crew(address, tmp_path / "notes", 0.1) as team:
        # All at once make the tables.
        team.start(3)
        result = team.join()
        assert sorted(team.points("begun")) == EVERY_POINT
    assert timeless(result["found"]) == undisturbed(tmp_path / "alone")
    assert_sound(address)
