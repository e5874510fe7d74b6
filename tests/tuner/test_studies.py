"""Fits and their studies: storages that fail, interruptions, kills, and several workers."""

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

import tuner.fit
from a2sf.schema import AlphaTable
from a2sf.tablefile import load_table
from tests.tuner.commands import ROOT, command, run
from tests.tuner.conftest import finished
from tests.tuner.postgres import postgresql
from tuner.study.ledger import Timing


def test_an_unreachable_database_has_a_separate_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    address = "postgresql://somebody:secret@127.0.0.1:1/studies"
    code, _, line = run(monkeypatch, capsys, *small_fit, "--storage", address)
    assert code == os.EX_UNAVAILABLE
    assert "the 'postgresql' storage cannot be reached" in line
    assert "secret" not in line


def test_a_study_of_another_fit_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    assert run(monkeypatch, capsys, *small_fit)[0] == 0
    code, _, line = run(monkeypatch, capsys, *small_fit, "--budget-ratio", 0.3)
    assert code == 2
    assert "made for another fit: budget_ratio is 0.2 there and 0.3 here" in line


@pytest.mark.parametrize("away", ["journal", "directory"])
def test_a_storage_that_fails_during_a_fit_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
    away: str,
) -> None:
    monkeypatch.setattr("tuner.study.ledger.Timing", partial(Timing, max_outage=0.5))
    honest = tuner.evaluation.objective.Objective.cost
    place = tmp_path / "volume"
    place.mkdir()

    def cost(
        self: tuner.evaluation.objective.Objective, *arguments: object
    ) -> tuner.evaluation.objective.Cost:
        if away == "journal":
            (place / "sums.journal").unlink(missing_ok=True)
        elif place.exists():
            place.rename(tmp_path / "unmounted")
        return honest(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner.evaluation.objective.Objective, "cost", cost)
    code, out, line = run(monkeypatch, capsys, *small_fit, "--out", place / "sums.json")
    assert (code, out) == (os.EX_UNAVAILABLE, "")
    assert line == (
        "error: the storage of study 'sums' has not answered for 0.5 s; the study is kept: run "
        "the same command again once the storage is back"
    )


@pytest.mark.slow
def test_a_database_that_fails_during_a_fit_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    monkeypatch.setattr("tuner.study.ledger.Timing", partial(Timing, max_outage=1.0))
    honest = tuner.evaluation.objective.Objective.cost
    with postgresql() as server:
        address = server.database("gone")

        def cost(
            self: tuner.evaluation.objective.Objective, *arguments: object
        ) -> tuner.evaluation.objective.Cost:
            server.stop()
            return honest(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(tuner.evaluation.objective.Objective, "cost", cost)
        code, out, line = run(monkeypatch, capsys, *small_fit, "--storage", address)
        server.start()
    assert (code, out) == (os.EX_UNAVAILABLE, "")
    assert "'sums' has not answered for 1 s; the study is kept" in line


def test_a_grpc_storage_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_fit: list[object]
) -> None:
    code, _, line = run(monkeypatch, capsys, *small_fit, "--storage", "grpc://127.0.0.1:13000")
    assert code == 2
    assert "the 'grpc' storage cannot be opened" in line


def test_an_interruption_is_one_line_and_keeps_the_study(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_fit: list[object],
    tmp_path: Path,
) -> None:
    begun: list[object] = []
    honest = tuner.evaluation.objective.Objective.cost

    def cost(
        self: tuner.evaluation.objective.Objective, *arguments: object
    ) -> tuner.evaluation.objective.Cost:
        begun.append(arguments)
        if len(begun) == 5:
            signal.raise_signal(signal.SIGINT)
        return honest(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner.evaluation.objective.Objective, "cost", cost)
    code, _, line = run(monkeypatch, capsys, *small_fit, "--stages", "layers")
    assert code == 130
    assert line == "interrupted; all measurements are kept: run the same command to continue"
    assert not (tmp_path / "sums.json").exists()
    code, _, _ = run(monkeypatch, capsys, *small_fit, "--stages", "layers")
    assert code == 0
    assert load_table(tmp_path / "sums.json").search.trials == 6
    # The second run takes up what was interrupted, and begins nothing else twice.
    assert begun[5] == begun[4]
    assert len(set(begun)) == len(begun) - 1


def fit_under(name: str, small_fit: list[object], tmp_path: Path) -> subprocess.Popen[str]:
    """A process that fits the small data with eighty trials, its files by this name."""
    return subprocess.Popen(
        command(
            *(*small_fit, "--trials", 80, "--name", "sums"),
            *("--out", tmp_path / f"{name}.json"),
        ),
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], file: Path) -> AlphaTable:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return load_table(file)


def searched(journal: Path) -> int:
    """Trials of a search: all that was measured but the proof."""
    return sum(not batch.startswith("proof ") for batch, _ in finished(journal))


def wait_for_trials(process: subprocess.Popen[str], journal: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(finished(journal)) < count:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_fit_continues_from_its_measurements(
    small_fit: list[object], tmp_path: Path
) -> None:
    journal = tmp_path / "killed.journal"
    first = fit_under("killed", small_fit, tmp_path)
    # Killed somewhere among the tables, after the 40 uniform ones.
    wait_for_trials(first, journal, 55)
    first.kill()
    first.communicate()
    kept = finished(journal)
    assert not (tmp_path / "killed.json").exists()

    resumed = wait_for(fit_under("killed", small_fit, tmp_path), tmp_path / "killed.json")
    whole = wait_for(fit_under("whole", small_fit, tmp_path), tmp_path / "whole.json")
    assert finished(journal)[: len(kept)] == kept
    assert len(set(finished(journal))) == len(finished(journal))
    # All stages together: uniform, the tables', and the layers that they are compared with.
    assert searched(journal) == searched(tmp_path / "whole.journal") == 80
    assert resumed.search.trials == whole.search.trials == 80
    assert (resumed.policy, resumed.evidence) == (whole.policy, whole.evidence)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_workers_with_one_killed_find_the_same_as_one_worker(
    small_fit: list[object], tmp_path: Path
) -> None:
    journal = tmp_path / "shared.journal"
    workers = [fit_under("shared", small_fit, tmp_path) for _ in range(3)]
    wait_for_trials(workers[0], journal, 30)
    workers[0].kill()
    workers[0].communicate()
    tables = [wait_for(worker, tmp_path / "shared.json") for worker in workers[1:]]
    alone = wait_for(fit_under("alone", small_fit, tmp_path), tmp_path / "alone.json")
    measured = finished(journal)
    assert len(set(measured)) == len(measured)
    assert searched(journal) == 80
    assert sorted(measured) == sorted(finished(tmp_path / "alone.journal"))
    for table in tables:
        assert table.search.trials == alone.search.trials == 80
        assert (table.policy, table.evidence) == (alone.policy, alone.evidence)
