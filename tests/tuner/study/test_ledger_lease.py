"""Whether somebody still works on a trial: by process where it can be seen, else by its lease."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from tests.tuner.crew import wait_for
from tuner.study.lease import LEASE, LeaseWatch, Worker, renewing

HERE = Worker.current()
ELSEWHERE = replace(HERE, host="elsewhere", key="b")
GRACE = 10.0


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("tuner.study.lease.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def running(worker: Worker, number: int = 0, beats: int = 0) -> FrozenTrial:
    attributes = {**worker.attributes(), LEASE: beats}
    trial = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
    trial.number = number
    return trial


def test_a_lease_that_is_still_for_the_grace_is_lost(clock: Clock) -> None:
    watch = LeaseWatch(HERE, GRACE)
    still = running(ELSEWHERE, number=1)
    for second in range(11):
        clock.now = second
        assert watch.abandoned([still, running(ELSEWHERE)]) == []
    clock.now = 10.5
    # The other beats just then, and begins anew.
    assert watch.abandoned([still, running(ELSEWHERE, beats=1)]) == [still]
    other = running(ELSEWHERE, beats=1)
    for second in range(11, 21):
        clock.now = second
        assert watch.abandoned([other]) == []
    clock.now = 21.0
    assert watch.abandoned([other]) == [other]


def test_silence_does_not_count_while_no_worker_watched(clock: Clock) -> None:
    watch = LeaseWatch(HERE, GRACE)
    still = running(ELSEWHERE)
    assert watch.abandoned([still]) == []
    # The storage was away, or this worker was: so may have been the other.
    clock.now = 1000.0
    assert watch.abandoned([still]) == []
    for second in range(1001, 1010):
        clock.now = second
        assert watch.abandoned([still]) == []
    clock.now = 1010.5
    assert watch.abandoned([still]) == [still]


def test_a_process_that_ended_is_noticed_at_once() -> None:
    watch = LeaseWatch(HERE, GRACE)
    alive = replace(HERE, key="b")
    reused = replace(HERE, key="b", started=HERE.started - 1)
    assert watch.abandoned([running(alive)]) == []
    assert len(watch.abandoned([running(reused)])) == 1
    # The same number means another process in another container, or for another user.
    assert watch.abandoned([running(replace(reused, realm="other"))]) == []
    assert watch.abandoned([running(replace(reused, host="other"))]) == []


def test_a_dead_process_that_is_not_reaped_counts_as_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        # Ticks since boot, as the kernel counts them.
        stat = Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii")
        started = int(stat.rpartition(")")[2].split()[19])
        other = running(replace(HERE, pid=child.pid, started=started, key="b"))
        watch = LeaseWatch(HERE, GRACE)
        assert watch.abandoned([other]) == []
        child.kill()
        wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert watch.abandoned([other]) == [other]
        child.communicate()
        assert watch.abandoned([other]) == [other]
    finally:
        child.kill()
        child.communicate()


def test_an_own_trial_whose_creation_got_no_answer_is_abandoned() -> None:
    own = running(HERE)
    assert LeaseWatch(HERE, GRACE).abandoned([own]) == [own]


def test_an_identity_is_of_one_process_and_one_ledger() -> None:
    one, two = Worker.current(), Worker.current()
    assert one.pid == os.getpid()
    assert one.key != two.key
    assert replace(one, key="") == replace(two, key="")


def test_a_lease_beats_for_as_long_as_the_work_lasts() -> None:
    storage = InMemoryStorage()
    study = storage.create_new_study([StudyDirection.MINIMIZE], "x")
    trial = storage.create_new_trial(study, running(HERE))

    def beats() -> int:
        return int(storage.get_trial(trial).user_attrs[LEASE])

    with renewing(storage, trial, 0.01):
        wait_for(lambda: beats() >= 3)
    at_the_end = beats()
    with renewing(storage, trial, 60.0):
        # Leaving does not wait for the next beat.
        pass
    assert beats() == at_the_end
    with renewing(storage, trial, 0.01):
        # One whom others gave up falls silent.
        storage.set_trial_state_values(trial, TrialState.FAIL)
