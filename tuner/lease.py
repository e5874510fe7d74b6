"""Who works on a trial, and whether somebody still does.

Owns a worker's identity, the beating of its lease, and the watch over the leases of others.
Knows nothing of what is measured, and compares no clocks: not of hosts, not of processes.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from tuner.storage import is_outage

WORKER = "worker"
LEASE = "lease"

LEASE_PERIOD = 5.0
"""Seconds between two beats of a lease."""

LEASE_GRACE = 60.0
"""Seconds without a beat after which a worker counts as gone."""


@dataclass(frozen=True)
class Worker:
    """One user of a ledger: a process, and which of its ledgers.

    A process is told from others by where its number holds (`realm`: the running kernel, the
    container's name space of numbers, and the user, since others' processes may be hidden), its
    number there, and its start in clock ticks since boot, since numbers are given again.
    """

    host: str
    realm: str
    pid: int
    started: int
    key: str

    @classmethod
    def current(cls) -> "Worker":
        """Make a new identity in this process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = Path("/proc/self/ns/pid").readlink()
        started = _started(os.getpid())
        assert started is not None
        return cls(
            host=socket.gethostname(),
            realm=f"{boot} {space} {os.getuid()}",
            pid=os.getpid(),
            started=started,
            key=uuid.uuid4().hex,
        )

    def attributes(self) -> dict[str, Any]:
        """The user attributes with which its trials begin."""
        return {WORKER: asdict(self), LEASE: 0}

    def sees_dead(self, other: dict[str, Any]) -> bool:
        """Whether another worker is known to be gone, without waiting for its lease."""
        here = (self.host, self.realm) == (other["host"], other["realm"])
        return here and _started(other["pid"]) != other["started"]


def _started(pid: int) -> int | None:
    """Clock ticks from boot to a process's start; None if it is gone, or dead and not reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@contextmanager
def beating(storage: BaseStorage, trial_id: int, period: float) -> Iterator[None]:
    """Raise a trial's lease every `period` seconds, in a thread, for as long as this lasts."""
    done = threading.Event()

    def beat() -> None:
        for beats in count(1):
            if done.wait(period):
                return
            try:
                storage.set_trial_user_attr(trial_id, LEASE, beats)
            except UpdateFinishedTrialError:
                # Others gave this trial up. Its worker will learn so when it brings the result.
                return
            except Exception as error:
                if not is_outage(error):
                    raise

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Watch:
    """Tells which running trials nobody works on any more."""

    def __init__(self, worker: Worker, grace: float) -> None:
        self._worker = worker
        self._grace = grace
        self._looked = time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {}

    def abandoned(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those whose process is gone, or whose lease was still for the grace.

        To be called between trials: a running one of this very worker is then one whose birth
        it was never told of.
        """
        now = time.monotonic()
        # Silence counts only while this worker listened: while it was stopped, was measuring, or
        # could not reach the storage, others may have beaten, or may have been cut off as well.
        if now - self._looked > self._grace / 2:
            self._beats.clear()
        self._looked = now
        found = []
        for trial in running:
            other, beats = trial.user_attrs[WORKER], trial.user_attrs[LEASE]
            last, since = self._beats.get(trial.number, (None, now))
            if beats != last:
                self._beats[trial.number] = (beats, now)
            silent = beats == last and now - since > self._grace
            if silent or other["key"] == self._worker.key or self._worker.sees_dead(other):
                found.append(trial)
        return found
