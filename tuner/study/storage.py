"""Opens the storage of a fit: a journal file for one machine, or a database for many hosts.

Owns opening a storage, the journal's lock and its repair after a kill, and waiting while a database
is unavailable. Knows nothing of what is stored. Never prints the address of a storage, which may
contain a password.
"""

import fcntl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy import Engine, event, make_url
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
)
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from a2sf.errors import InvalidArgument, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

MAX_OUTAGE = 300.0
"""Seconds that a database may be unavailable before a worker gives up."""

_LONGEST_PAUSE = 5.0
"""Longest pause in seconds between two calls to an unavailable database; well within the grace of a
lease."""

_RECORD = b'{"op_code":'
"""The beginning of every line of a journal."""

# Without timeouts, a host that disappears would block a worker for hours.
_POSTGRESQL_TIMEOUTS = {"connect_timeout": 10, "tcp_user_timeout": 30_000}

_SQLITE_LOCK_TIMEOUT_S = 60


def open_storage(url: str | None, journal: Path) -> tuple[BaseStorage, str]:
    """Open the storage at `url`, or the journal file; return it and its kind.

    Raises Unavailable if it cannot be reached, and InvalidArgument if it cannot be opened; the
    messages do not contain the address.
    """
    # Optuna's warnings quote the driver's messages, which contain the address.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Libraries and drivers raise various errors, including assertions, for contents that they
    # cannot read. None of these is a bug of this program.
    if url is None:
        try:
            return _open_journal(str(journal)), "journal"
        except Exception as error:
            raise InvalidArgument(
                "storage",
                f"{journal} is not a complete journal ({type(error).__name__}: {error}); move it "
                "away, or use another --out",
            ) from error
    kind = url.split(":", 1)[0]
    try:
        return _open_database(url), kind
    except ImportError:
        raise InvalidArgument(
            "storage",
            f"the {kind!r} storage needs a driver that is not installed; for PostgreSQL: "
            "pip install 'a2sf-serve[postgres]'",
        ) from None
    except Exception as error:
        if is_outage(error):
            raise Unavailable(
                f"storage: the {kind!r} storage cannot be reached ({type(error).__name__}); check "
                "that it runs and accepts this user, then run the same command again"
            ) from None
        raise InvalidArgument(
            "storage",
            f"the {kind!r} storage cannot be opened ({type(error).__name__}); accepted: a URL such "
            "as sqlite:///file.db or postgresql://user@host/name, or nothing for a journal file",
        ) from None


class KernelLock(BaseJournalFileLock):
    """A journal's lock, which the kernel releases when its holder dies.

    Optuna's own locks are files. A killed worker leaves its lock file behind, and the others then
    wait half a minute and break it by the clock. This lock needs a local file system; many hosts
    use a database instead. A holder that is stopped, not killed, is waited for.

    On acquiring the lock, an incomplete last line of a killed writer is removed. Otherwise the next
    line would be joined to it, and the journal would be unreadable. Readers ignore an incomplete
    last line.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Wait for the lock, and repair the journal; ValueError if it ends in anything else."""
        file = Path(self._path).open("r+b")  # noqa: SIM115 - open for as long as it is locked
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            _remove_torn_line(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Release the lock."""
        assert self._file is not None
        self._file.close()
        self._file = None


def _remove_torn_line(file: BinaryIO) -> None:
    size = file.seek(0, 2)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    complete_lines, newline, torn = file.read().rpartition(b"\n")
    if not torn.startswith(_RECORD[: len(torn)]):
        raise ValueError("its last line is not a record")
    file.truncate(len(complete_lines) + len(newline))


def _open_journal(path: str) -> BaseStorage:
    lock = KernelLock(path)
    backend = JournalFileBackend(path, lock_obj=lock)
    # A file that is not a journal is refused here, not at the first record.
    lock.acquire()
    lock.release()
    return JournalStorage(backend)


def _open_database(address: str) -> BaseStorage:
    url = make_url(address)
    if url.drivername == "postgresql":
        # The driver of the bare name depends on SQLAlchemy's version.
        url = url.set(drivername="postgresql+psycopg")
    arguments: dict[str, Any] = {}
    if url.get_backend_name() == "postgresql":
        # The address may set these itself.
        arguments = {k: v for k, v in _POSTGRESQL_TIMEOUTS.items() if k not in url.query}
    elif url.get_backend_name() == "sqlite":
        arguments = {"timeout": _SQLITE_LOCK_TIMEOUT_S}
    opening = Retrying(
        retry=retry_if_exception(_is_race),
        wait=wait_random_exponential(multiplier=0.1, max=1),
        stop=stop_after_attempt(10),
        reraise=True,
    )
    storage: RDBStorage = opening(
        RDBStorage,
        url.render_as_string(hide_password=False),
        engine_kwargs={"pool_pre_ping": True, "connect_args": arguments},
    )
    if url.get_backend_name() == "sqlite":
        _serialise(storage.engine)
    return storage


def _is_race(error: BaseException) -> bool:
    """Whether another worker made the tables at the same moment."""
    return isinstance(error, DBAPIError) and (
        not isinstance(error, OperationalError) or "already exists" in str(error.orig)
    )


def _serialise(engine: Engine) -> None:
    """Make every transaction of an SQLite engine hold the lock from its first read.

    Optuna reads a trial's state and then writes it, under a row lock, which SQLite does not have.
    Between the two, another worker could finish a trial that this one considers running.
    """

    @event.listens_for(engine, "connect")
    def _(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    # Connections in the pool were opened without these listeners.
    engine.dispose()


def is_outage(error: BaseException) -> bool:
    """Whether a storage failed because it is unavailable, so that the call may succeed later."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    # The last case is Optuna's error if a connection breaks during a read and Optuna continues to
    # read.
    return isinstance(
        cause, OperationalError | InterfaceError | OSError | PendingRollbackError
    ) or (isinstance(cause, DBAPIError) and cause.connection_invalidated)


class OutageRetry:
    """Retries calls to a storage, with growing pauses, while it is unavailable.

    A call whose answer was lost is made twice; the caller must ensure that this is harmless.
    """

    def __init__(self, study: str, seconds: float) -> None:
        self._study = study
        self._seconds = seconds

    def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of `call`; Unavailable after failures for the whole time."""
        retrying = Retrying(
            retry=retry_if_exception(is_outage),
            wait=wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE),
            stop=stop_after_delay(self._seconds),
            before_sleep=self._report_start,
        )
        try:
            answer = retrying(call, *args, **kwargs)
        except RetryError:
            raise Unavailable(
                f"the storage of study {self._study!r} has not answered for {self._seconds:g} s; "
                "the study is kept: run the same command again once the storage is back"
            ) from None
        except Exception:
            # The storage answered, even if with an error.
            self._report_end(retrying)
            raise
        self._report_end(retrying)
        return answer

    def _report_start(self, state: RetryCallState) -> None:
        if state.attempt_number == 1:
            self._say(f"does not answer; waiting up to {self._seconds:g} s")

    def _report_end(self, retrying: Retrying) -> None:
        if retrying.statistics["attempt_number"] > 1:
            self._say("is back")

    def _say(self, what: str) -> None:
        print(f"the storage of study {self._study!r} {what}", file=sys.stderr, flush=True)
