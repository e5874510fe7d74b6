"""Workers of one fit as processes, and what they did."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from optuna.storages import BaseStorage, RDBStorage

from tests.tuner.ledger_worker import BATCHES, POINTS, search
from tuner.study.ledger import Ledger
from tuner.study.storage import open_storage

EVERY_POINT = [(batch, index) for batch in range(BATCHES) for index in range(POINTS)]


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> None:
    """Look until `what` is so."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.02)


@dataclass
class Crew:
    """Processes that work at the study `s` of one storage, and leave notes in `directory`."""

    address: str
    directory: Path
    seconds: float
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, count: int = 1) -> None:
        command = [sys.executable, "-m", "tests.tuner.ledger_worker"]
        for _ in range(count):
            with (self.directory / "stderr").open("ab") as stderr:
                self.workers.append(
                    subprocess.Popen(
                        [*command, self.address, "s", str(self.directory), str(self.seconds)],
                        stderr=stderr,
                    )
                )

    def events(self) -> list[tuple[str, int, int, int]]:
        """Kind, batch, index and process of what happened, in order."""
        path = self.directory / "events"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line.split() for line in text.splitlines()]
        return [(kind, *map(int, numbers)) for kind, *numbers in lines]

    def points(self, kind: str, pid: int | None = None) -> list[tuple[int, int]]:
        """Batch and index of every event of a kind, of one process or all."""
        return [(b, i) for k, b, i, p in self.events() if k == kind and pid in (None, p)]

    def busy(self, worker: subprocess.Popen[bytes]) -> bool:
        """Whether a worker is in the middle of a point."""
        begun = len(self.points("begun", worker.pid))
        return begun > len(self.points("ended", worker.pid))

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        worker.kill()
        worker.wait()
        self.workers.remove(worker)

    def stop(self, worker: subprocess.Popen[bytes]) -> None:
        """Stop a worker while it has no lock."""
        process = psutil.Process(worker.pid)
        while True:
            worker.send_signal(signal.SIGSTOP)
            wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
            if "://" in self.address or not _holds_lock(worker.pid, Path(self.address)):
                return
            worker.send_signal(signal.SIGCONT)

    def join(self) -> dict[str, Any]:
        """Wait for all, and return what they found, which must be the same for all."""
        for worker in self.workers:
            errors = (self.directory / "stderr").read_text
            assert worker.wait(90) == 0, errors(encoding="utf-8")
        paths = [self.directory / f"{worker.pid}.json" for worker in self.workers]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        assert found
        assert all(one == found[0] for one in found)
        self.workers.clear()
        return dict(found[0])


def _holds_lock(pid: int, journal: Path) -> bool:
    locked = f"{journal.stat().st_ino} "
    lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    return any("->" not in line and f" {pid} " in line and locked in line for line in lines)


@contextmanager
def crew(address: str | Path, directory: Path, seconds: float) -> Iterator[Crew]:
    """Let a crew work, and leave none of its processes behind."""
    directory.mkdir(exist_ok=True)
    made = Crew(str(address), directory, seconds)
    try:
        yield made
    finally:
        for worker in made.workers:
            worker.kill()
            worker.wait()


@contextmanager
def opened(address: str | Path) -> Iterator[BaseStorage]:
    """A storage for this process, which leaves no connection behind."""
    text = str(address)
    storage, _ = open_storage(text if "://" in text else None, Path(text))
    yield storage
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def undisturbed(directory: Path) -> list[list[dict[str, Any]]]:
    """The result of one undisturbed worker, without the seconds it took."""
    directory.mkdir()
    with opened(directory / "alone.journal") as storage:
        found = search(Ledger(storage, "s", {"seed": 0}), directory, 0.0)
    return timeless([[vars(one) for one in batch] for batch in found])


def timeless(found: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    return [[{**one, "seconds": None} for one in batch] for batch in found]


def assert_sound(address: str | Path) -> None:
    """Every point has one finished trial, and no trial runs."""
    with opened(address) as storage:
        ledger = Ledger(storage, "s", {"seed": 0})
        assert ledger.trials == len(EVERY_POINT)
        for batch in range(BATCHES):
            assert set(ledger.of(f"batch {batch}")) == set(range(POINTS))
        study = storage.get_study_id_from_name("s")
        assert all(trial.state.is_finished() for trial in storage.get_all_trials(study))
