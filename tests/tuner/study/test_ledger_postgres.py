"""A study that many hosts share, on a real database that is restarted under their hands."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuner.crew import EVERY_POINT, assert_sound, crew, timeless, undisturbed, wait_for
from tests.tuner.ledger_worker import POINTS
from tests.tuner.postgres import Server, postgresql

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgresql() as running:
        yield running


def test_workers_survive_a_kill_and_two_outages_of_their_database(
    tmp_path: Path, server: Server
) -> None:
    address = server.database("outages")
    with crew(address, tmp_path / "notes", 0.4) as team:

        def said(what: str) -> int:
            return (team.directory / "stderr").read_text(encoding="utf-8").count(what)

        team.start(3)
        victim = team.workers[0]
        wait_for(lambda: team.busy(victim))
        team.stop(victim)
        lost = team.points("begun", victim.pid)[-1]
        team.kill(victim)
        wait_for(lambda: len(team.points("ended")) > POINTS)
        server.restart()
        wait_for(lambda: len(team.points("ended")) > 2 * POINTS)
        server.stop()
        # Not a fixed time: Optuna retries the creation of a trial in silence for some seconds.
        wait_for(lambda: said("does not answer") - said("is back") == len(team.workers))
        assert all(worker.poll() is None for worker in team.workers)
        server.start()
        result = team.join()
        assert sorted(team.points("begun")) == sorted([*EVERY_POINT, lost])
        lines = (team.directory / "stderr").read_text(encoding="utf-8").splitlines()
    assert timeless(result["found"]) == undisturbed(tmp_path / "alone")
    assert_sound(address)
    assert said("does not answer") == said("is back") >= 2
    # Nothing else: no traceback, and no library that quotes the address.
    assert all(line.startswith("the storage of study 's' ") for line in lines)


def test_workers_may_all_be_the_first_in_an_empty_database(tmp_path: Path, server: Server) -> None:
    with crew(server.database("empty"), tmp_path / "notes", 0.05) as team:
        team.start(3)
        team.join()
        assert sorted(team.points("begun")) == EVERY_POINT
