"""Opening storages, and what a kill, a full disk or another program leaves in a journal."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
)

from a2sf.errors import A2SFError, InvalidArgument, Unavailable
from tests.tuner.crew import opened
from tuner.study.storage import KernelLock, OutageRetry, open_storage


def asked(storage: BaseStorage) -> int:
    """One more trial, and how many there are."""
    study = optuna.create_study(storage=storage, study_name="x", load_if_exists=True)
    study.ask().set_user_attr("kl", [0.1, 0.2])
    return len(study.trials)


def test_the_kind_of_a_storage_is_returned(tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    assert open_storage(None, journal)[1] == "journal"
    assert open_storage(f"sqlite:///{tmp_path}/x.db", tmp_path / "unused.journal")[1] == "sqlite"
    assert not (tmp_path / "unused.journal").exists()


@pytest.mark.parametrize(
    ("url", "kind", "reported"),
    [
        ("nosuch://me:secret@host/db", InvalidArgument, "storage cannot be opened"),
        ("me:secret@host", InvalidArgument, "storage cannot be opened"),
        ("postgresql://me:secret@127.0.0.1:1/db", Unavailable, "storage cannot be reached"),
    ],
)
def test_an_error_about_a_storage_does_not_contain_its_address(
    tmp_path: Path,
    url: str,
    kind: type[A2SFError],
    reported: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(kind, match=reported) as caught:
        open_storage(url, tmp_path / "x.journal")
    assert "secret" not in str(caught.value) + "".join(capfd.readouterr())
    assert caught.value.__suppress_context__


def test_a_missing_driver_is_reported_with_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidArgument, match=r"driver.*a2sf-serve\[postgres\]"):
        open_storage("postgresql://me:secret@127.0.0.1:1/db", tmp_path / "x.journal")


@pytest.mark.parametrize("content", ["not a journal\n\n", '{"op_code": 99}\n', "[1]\n", "notes"])
def test_a_file_that_is_not_a_journal_is_named_and_not_changed(
    tmp_path: Path, content: str
) -> None:
    journal = tmp_path / "x.journal"
    journal.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArgument, match=r"x\.journal is not a complete journal"):
        open_storage(None, journal)
    assert journal.read_text(encoding="utf-8") == content


def test_an_incomplete_last_line_of_a_journal_is_ignored(tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    with opened(journal) as storage:
        assert asked(storage) == 1
    complete_lines = journal.read_bytes()
    last = len(complete_lines) - complete_lines[:-1].rfind(b"\n") - 1
    for torn in range(1, last + 1):
        journal.write_bytes(complete_lines[:-torn])
        with opened(journal) as reader, opened(journal) as writer:
            assert reader.get_all_trials(0)[0].user_attrs == {}
            assert asked(writer) == 2
            # Nor are those in the way who read before the end was mended.
            assert len(reader.get_all_trials(0)) == 2
            assert asked(reader) == 3


def test_the_next_writer_removes_an_incomplete_line(tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    with opened(journal) as storage, opened(journal) as other:
        asked(storage)
        with journal.open("ab") as file:
            file.write(b'{"op_code":8,"wor')
        assert len(storage.get_all_trials(0)) == 1
        assert asked(other) == 2
        assert asked(storage) == 3


def test_a_lock_whose_holder_is_killed_is_free(tmp_path: Path) -> None:
    journal = tmp_path / "x.journal"
    journal.touch()
    program = (
        "import sys; from tuner.study.storage import KernelLock; "
        "lock = KernelLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(journal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        lock, got = KernelLock(str(journal)), threading.Event()
        waiting = threading.Thread(target=lambda: (lock.acquire(), got.set()), daemon=True)
        waiting.start()
        assert not got.wait(0.2)
        holder.send_signal(signal.SIGKILL)
        assert got.wait(10)
        lock.release()
    finally:
        holder.kill()
        holder.communicate()


def test_sqlite_finishes_no_trial_twice(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/x.db"
    with opened(address) as storage:
        study = optuna.create_study(storage=storage, study_name="x")
        trials = [study.ask().number for _ in range(20)]
    ready = threading.Barrier(2)
    done: list[int] = []

    def finish(state: TrialState) -> None:
        with opened(address) as storage:
            for number in trials:
                trial = storage.get_trial_id_from_study_id_trial_number(1, number)
                ready.wait()
                try:
                    storage.set_trial_state_values(trial, state)
                except optuna.exceptions.UpdateFinishedTrialError:
                    continue
                done.append(number)

    threads = [threading.Thread(target=finish, args=(s,)) for s in (TrialState(2), TrialState(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == trials


def failed(cause: Exception) -> Exception:
    """An error as Optuna wraps it."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause
    return error


WRONG = ProgrammingError("select", {}, ValueError("no such column"))
GONE = OperationalError("select", {}, ValueError("connection refused"))
BROKEN = DBAPIError("select", {}, ValueError("closed"), connection_invalidated=True)


@pytest.mark.parametrize("error", [WRONG, failed(WRONG), KeyError("no such trial")])
def test_errors_that_are_not_outages_are_raised_at_once(error: Exception) -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        OutageRetry("x", 30.0)(fails)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error",
    [
        GONE,
        failed(GONE),
        failed(InterfaceError("select", {}, ValueError("closed"))),
        failed(BROKEN),
        failed(PendingRollbackError("Can't reconnect until invalid transaction is rolled back.")),
        ConnectionResetError(),
    ],
)
def test_an_outage_is_waited_for_and_reported_once(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [error, error]

    def answers() -> int:
        if errors:
            raise errors.pop()
        return 3

    assert OutageRetry("x", 30.0)(answers) == 3
    assert capsys.readouterr().err == (
        "the storage of study 'x' does not answer; waiting up to 30 s\n"
        "the storage of study 'x' is back\n"
    )
