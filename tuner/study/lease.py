"""Identifies the worker of a trial, and detects workers that are gone.

Owns a worker's identity, the renewal of its lease, and the watch over the leases of others. Knows
nothing of what is measured. Compares no clocks between hosts or processes.
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

from tuner.study.storage import is_outage

WORKER = "worker"
LEASE = "lease"

LEASE_PERIOD = 5.0
"""Seconds between two renewals of a lease."""

LEASE_GRACE = 60.0
"""Seconds without a renewal after which a worker counts as gone."""


@dataclass(frozen=True)
class Worker:
    """One user of a ledger: a process, and one of its ledgers.

    A process is identified by three values: the `realm` in which its process id is valid (the
    running kernel, the container's PID namespace, and the user, because processes of others may be
    hidden), its process id, and its start in clock ticks since boot, because process ids are
    reused.
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
        """The user attributes of a new trial of this worker."""
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
    # The name, in parentheses, may contain any characters.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@contextmanager
def renewing(storage: BaseStorage, trial_id: int, period: float) -> Iterator[None]:
    """Renew a trial's lease every `period` seconds, in a thread, during the block."""
    done = threading.Event()

    def beat() -> None:
        for beats in count(1):
            if done.wait(period):
                return
            try:
                storage.set_trial_user_attr(trial_id, LEASE, beats)
            except UpdateFinishedTrialError:
                # Another worker gave this trial up. This worker learns of it when it stores its
                # result.
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


class LeaseWatch:
    """Finds running trials whose worker is gone."""

    def __init__(self, worker: Worker, grace: float) -> None:
        self._worker = worker
        self._grace = grace
        self._last_look = time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {}

    def abandoned(self, running: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return trials whose process is gone, or whose lease was not renewed during the grace.

        Call it between trials only: a running trial of this worker is then one that was created
        without an answer from the storage.
        """
        now = time.monotonic()
        # Silence counts only while this worker was watching. While it was stopped, measuring or cut
        # off from the storage, other workers may have renewed their leases, or been cut off as
        # well.
        if now - self._last_look > self._grace / 2:
            self._beats.clear()
        self._last_look = now
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
