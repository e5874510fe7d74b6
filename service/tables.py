"""The alpha tables that requests may name: a directory, read at the start and again when told.

Owns finding and checking the files, which table is the default, and the reason why a file was
refused, so that a request that names it is told that very reason. A request's name is only ever
looked up among the tables already read; no path is built from it. Knows nothing of messages, of
the engine, or of who asks for another reading.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import structlog

from a2sf.errors import A2SFError, Conflict, InvalidArgument, NotFound, TableError, TableInvalid
from a2sf.schema import AlphaTable, ModelIdentity
from a2sf.tablefile import MAX_FILE_BYTES, parse_table
from service import files

log = structlog.get_logger(__name__)

ETAG_CHARACTERS = 16

MAX_REASON_CHARACTERS = 500
"""Of what is wrong with a file: it may repeat what is in there, and all are told in one answer."""


@dataclass(frozen=True)
class TableStore:
    """What is served at one moment, never changed: the next moment has a store of its own."""

    tables: Mapping[str, AlphaTable] = field(default_factory=dict)
    """By name, in the names' order."""
    refused: Mapping[str, TableError] = field(default_factory=dict)
    """Why files are not served as they are now, by the name of the table or of the file."""
    default: str | None = None
    """Name of the table, one of `tables`, of requests that name no method."""

    @cached_property
    def etag(self) -> str:
        """Hexadecimal digest of tables and default: another state has another, the same the same.

        Refusals have no part in it: they change nothing that a request could be served with.
        """
        lines = [f"{name} {table.sha256}" for name, table in sorted(self.tables.items())]
        state = "\n".join([self.default or "", *lines])
        return hashlib.sha256(state.encode()).hexdigest()[:ETAG_CHARACTERS]

    def lookup(self, name: str) -> AlphaTable:
        """Return the table of this name.

        Raises NotFound, naming the tables there are; for a table that was refused, the error that
        it was refused with.
        """
        if name in self.tables:
            return self.tables[name]
        if name in self.refused:
            refusal = self.refused[name]
            raise type(refusal)(str(refusal))
        known = ", ".join(self.tables) or "none"
        raise NotFound(f"no alpha table {name!r}; served: {known}")


@dataclass(frozen=True)
class Reloaded:
    """What reading the directory again has changed, by the tables' names, and the new state."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    """Those that have another content now."""
    removed: tuple[str, ...]
    refused: Mapping[str, TableError]
    """All that are refused now, also those that were before."""
    etag: str


def _anything(table: AlphaTable) -> None:
    """Refuse no table: while there is no default, there is nothing for it to fit."""


class TableCatalog:
    """The directory of tables as it was last read, and the default among them.

    `now` is replaced as a whole, so whoever reads it sees one state; a request that has looked up
    its table keeps that table whatever is read later. All else may be called from any thread, and
    reads files or waits for a thread that does: not for the event loop.
    """

    def __init__(self, directory: Path | None, identity: ModelIdentity) -> None:
        """Read `directory` (None: there are no tables) for the model of `identity`.

        Raises NotFound where it cannot be listed.
        """
        self.directory = directory
        """What is read; None: nothing."""
        self._identity = identity
        self._check: Callable[[AlphaTable], None] = _anything
        self._lock = threading.Lock()
        # The table that is served from each file, by the file's name: a bad file keeps it there.
        self._kept: dict[str, AlphaTable] = {}
        self._refused: list[tuple[str, TableError]] = []
        # The default, where its file is gone.
        self._orphan: AlphaTable | None = None
        self._default: str | None = None
        self._seen: object = None
        self.now = TableStore()
        if directory is not None:
            self._read(directory)

    def settle(self, default: str | None, check: Callable[[AlphaTable], None]) -> None:
        """Begin with this default, and let no table follow it that `check` raises an error for.

        `check` is given what would be the default, and raises one of the project's errors where
        requests that name no method would not always fit with it. Raises what `lookup` and `check`
        raise. Comes once, before anything is served: how the engine's rows are dealt, which is what
        tables must fit, is known only once the first default has been read.
        """
        if default is not None:
            check(self.now.lookup(default))
        self._check = check
        self._default = default
        self._publish()

    def outdated(self) -> bool:
        """Whether the directory looks other than when it was last read; looks into no file."""
        return self.directory is not None and self._seen != _look(self.directory)

    def reload(self) -> Reloaded:
        """Read the directory again.

        A file that cannot be used changes nothing: the table that was served from it stays. A file
        that is gone takes its table with it, but for the default. Of two files with one name, the
        one that is served stays. Raises NotFound, with nothing changed, where the directory cannot
        be listed or the server has none.
        """
        with self._lock:
            if self.directory is None:
                raise NotFound("this server was started without a directory of alpha tables")
            return self._read(self.directory)

    def activate(self, name: str, etag: str) -> TableStore:
        """Make `name` the default (empty: none) if `etag` is the present state's; return the new.

        Raises InvalidArgument without an etag, Conflict for that of another state, what `lookup`
        raises for a table that is not served, and TableInvalid for one that cannot be the default.
        """
        with self._lock:
            if not etag:
                raise InvalidArgument("etag", "missing; ListAlphaTables tells it")
            if etag != self.now.etag:
                raise Conflict(
                    f"the alpha tables are no longer as etag {etag!r} has them; read them again "
                    "with ListAlphaTables, then decide"
                )
            if name:
                self._check(self.now.lookup(name))
            self._default = name or None
            if self._orphan is not None and self._orphan.name != name:
                self._orphan = None
            self._publish()
            log.info("default alpha table activated", table=name, etag=self.now.etag)
            return self.now

    def _read(self, directory: Path) -> Reloaded:
        # Looked at before it is read: a change during the reading is then seen as one.
        look = _look(directory)
        try:
            names = sorted(entry.name for entry in directory.iterdir() if _is_table(entry.name))
        except OSError as error:
            raise NotFound(
                f"the directory of alpha tables cannot be listed: {error.strerror}; the tables "
                "that are served stay"
            ) from error
        whole: dict[str, AlphaTable] = {}
        refused: list[tuple[str, TableError]] = []
        kept: dict[str, AlphaTable] = {}
        for file in names:
            before = self._kept.get(file)
            # Until the file tells the table's name, it goes by the one that it had, or by its own.
            name = before.name if before is not None else Path(_printable(file)).stem
            try:
                table = parse_table(_contents(directory / file))
                name = table.name
                table.check_model(self._identity)
                if name == self._default and table.sha256 != self.now.tables[name].sha256:
                    self._check(table)
            except FileNotFoundError:
                continue  # removed since it was listed, or a link that leads nowhere
            # A damaged file is refused whatever a library makes of it.
            except (A2SFError, OSError, ValueError, RecursionError) as error:
                if before is not None:
                    kept[file] = before
                refused.append((name, _refusal(file, error)))
            else:
                whole[file] = table
        taken = {table.name: file for file, table in kept.items()}
        # Whoever served a name goes before another file of that name.
        for file in sorted(whole, key=lambda file: (not self._served(file, whole[file]), file)):
            table = whole[file]
            if taken.setdefault(table.name, file) == file:
                kept[file] = table
            else:
                why = f"another file, {_printable(taken[table.name])}, has the name {table.name!r}"
                refused.append((table.name, _refusal(file, TableInvalid(why))))
        default = self.now.tables[self._default] if self._default is not None else None
        self._orphan = default if default is not None and default.name not in taken else None
        self._kept, self._refused, self._seen = kept, refused, look
        past = self.now
        self._publish()
        return _told(past, self.now)

    def _served(self, file: str, table: AlphaTable) -> bool:
        return file in self._kept and self._kept[file].name == table.name

    def _publish(self) -> None:
        tables = {table.name: table for table in self._kept.values()}
        refused: dict[str, TableError] = {}
        for name, error in self._refused:
            first = refused.get(name)
            refused[name] = type(first)(f"{first}; {error}") if first is not None else error
        if self._orphan is not None:
            name = self._orphan.name
            tables[name] = self._orphan
            gone = TableError(f"no file has alpha table {name!r} any more; it stays as the default")
            refused.setdefault(name, gone)
        self.now = TableStore(
            dict(sorted(tables.items())), dict(sorted(refused.items())), self._default
        )


def _printable(file: str) -> str:
    """Put a file's name into text that can be sent, whatever bytes it is of."""
    return os.fsencode(file).decode(errors="replace")


def _is_table(file: str) -> bool:
    return file.endswith(".json") and not file.startswith(".")


def _look(directory: Path) -> object:
    """What can be seen of a directory and its tables without reading any; None: nothing can."""
    try:
        entries = [entry for entry in directory.iterdir() if _is_table(entry.name)]
        seen = directory.stat()
    except OSError:
        return None
    return (seen.st_dev, seen.st_ino), {entry.name: files.stamp(entry) for entry in entries}


def _contents(path: Path) -> bytes:
    try:
        return files.contents(path, MAX_FILE_BYTES)
    except files.Unfit as error:
        raise TableInvalid(str(error)) from None


def _refusal(file: str, error: Exception) -> TableError:
    """Name the file, and keep the directory to ourselves: paths are no client's business."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if len(why) > MAX_REASON_CHARACTERS:
        why = f"{why[:MAX_REASON_CHARACTERS]}..."
    kind = type(error) if isinstance(error, TableError) else TableError
    return kind(f"alpha table {_printable(file)}: {why}")


def _told(before: TableStore, now: TableStore) -> Reloaded:
    """Compare, and write what is new into the log."""
    old, new = before.tables, now.tables
    told = Reloaded(
        added=tuple(name for name in new if name not in old),
        changed=tuple(n for n in new if n in old and new[n].sha256 != old[n].sha256),
        removed=tuple(name for name in old if name not in new),
        refused=now.refused,
        etag=now.etag,
    )
    _log_tables("alpha table added", told.added, new)
    _log_tables("alpha table changed", told.changed, new)
    _log_tables("alpha table removed", told.removed, old)
    for name, error in now.refused.items():
        if str(error) != str(before.refused.get(name)):
            log.warning("alpha table refused", table=name, reason=str(error))
    return told


def _log_tables(event: str, names: Iterable[str], tables: Mapping[str, AlphaTable]) -> None:
    for name in names:
        log.info(event, table=name, sha256=tables[name].sha256)
