"""The alpha tables that requests may name, read from a directory at startup and on reload.

Owns finding and checking the files, which table is the default, and why a file was refused, so that
a request that names it gets that reason. A name in a request is only looked up among the tables
that were read; it never becomes part of a path. Knows nothing of messages, of the engine, or of
what causes a reload.
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
from service.config import files

log = structlog.get_logger(__name__)

ETAG_CHARACTERS = 16

MAX_REASON_CHARACTERS = 500
"""Longest reason for a refused file. It may quote the file, and one response has all reasons."""


@dataclass(frozen=True)
class TableStore:
    """The tables at one moment. Immutable: each change makes a new store."""

    tables: Mapping[str, AlphaTable] = field(default_factory=dict)
    """By name, sorted."""
    refused: Mapping[str, TableError] = field(default_factory=dict)
    """Why files are not served in their present state, by table name or file name."""
    default: str | None = None
    """Name of the table, one of `tables`, for requests that name no method."""

    @cached_property
    def etag(self) -> str:
        """Hexadecimal digest of tables and default; equal states have equal digests.

        Refused files are not included: they do not change what a request can be served with.
        """
        lines = [f"{name} {table.sha256}" for name, table in sorted(self.tables.items())]
        state = "\n".join([self.default or "", *lines])
        return hashlib.sha256(state.encode()).hexdigest()[:ETAG_CHARACTERS]

    def lookup(self, name: str) -> AlphaTable:
        """Return the table of this name.

        Raises NotFound with the names of the served tables; for a refused table, the error that it
        was refused with.
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
    """What a reload changed, by table name, and the new state."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    """Tables with new content."""
    removed: tuple[str, ...]
    refused: Mapping[str, TableError]
    """All tables that are refused now, including those that were refused before."""
    etag: str


def _anything(table: AlphaTable) -> None:
    """Accept every table: without a default table there is nothing to check."""


class TableCatalog:
    """The directory of tables as it was last read, and the default table.

    `now` is replaced as a whole, so a reader sees one consistent state. A request keeps the table
    that it has looked up, even after a reload. All other members may be called from any thread;
    they read files, or wait for a thread that does, so do not call them in the event loop.
    """

    def __init__(self, directory: Path | None, identity: ModelIdentity) -> None:
        """Read `directory` (None: no tables) for the model of `identity`.

        Raises NotFound if the directory cannot be listed.
        """
        self.directory = directory
        """The directory to read; None: nothing is read."""
        self._identity = identity
        self._check: Callable[[AlphaTable], None] = _anything
        self._lock = threading.Lock()
        # The table served from each file, by file name. It stays here if its file becomes invalid.
        self._by_file: dict[str, AlphaTable] = {}
        self._refused: list[tuple[str, TableError]] = []
        # The default table, if its file is gone.
        self._default_without_file: AlphaTable | None = None
        self._default: str | None = None
        self._last_stamp: object = None
        self.now = TableStore()
        if directory is not None:
            self._read(directory)

    def set_default(self, default: str | None, check: Callable[[AlphaTable], None]) -> None:
        """Set the first default table, and the check that every later default must pass.

        `check` gets the candidate, and raises one of the project's errors if requests that name no
        method would not always fit with it. Raises the errors of `lookup` and `check`. Call it
        once, before serving: the split of the engine's slots, which tables must fit, is known only
        after the first default has been read.
        """
        if default is not None:
            check(self.now.lookup(default))
        self._check = check
        self._default = default
        self._publish()

    def outdated(self) -> bool:
        """Whether the directory has changed since it was last read; opens no file."""
        return self.directory is not None and self._last_stamp != _directory_stamp(self.directory)

    def reload(self) -> Reloaded:
        """Read the directory again.

        An invalid file changes nothing: the table that was served from it stays. If a file is gone,
        its table goes too, except the default. If two files have the same table name, the one that
        is served stays. Raises NotFound, with nothing changed, if the directory cannot be listed or
        the server has none.
        """
        with self._lock:
            if self.directory is None:
                raise NotFound("this server was started without a directory of alpha tables")
            return self._read(self.directory)

    def activate(self, name: str, etag: str) -> TableStore:
        """Make `name` the default (empty: none) if `etag` matches; return the new state.

        Raises InvalidArgument without an etag, Conflict if the etag is not the current one, the
        errors of `lookup` for a table that is not served, and TableInvalid for one that cannot be
        the default.
        """
        with self._lock:
            if not etag:
                raise InvalidArgument("etag", "missing; ListAlphaTables returns it")
            if etag != self.now.etag:
                raise Conflict(
                    f"the alpha tables have changed since etag {etag!r}; call ListAlphaTables "
                    "again, then decide"
                )
            if name:
                self._check(self.now.lookup(name))
            self._default = name or None
            if self._default_without_file is not None and self._default_without_file.name != name:
                self._default_without_file = None
            self._publish()
            log.info("default alpha table activated", table=name, etag=self.now.etag)
            return self.now

    def _read(self, directory: Path) -> Reloaded:
        # The stamp is taken before the read, so a change during the read causes another read.
        stamp = _directory_stamp(directory)
        try:
            names = sorted(entry.name for entry in directory.iterdir() if _is_table(entry.name))
        except OSError as error:
            raise NotFound(
                f"the directory of alpha tables cannot be listed: {error.strerror}; the server "
                "keeps its tables"
            ) from error
        valid: dict[str, AlphaTable] = {}
        refused: list[tuple[str, TableError]] = []
        by_file: dict[str, AlphaTable] = {}
        for file in names:
            before = self._by_file.get(file)
            # Until the table's name is known, use the name it had before, or the file's name.
            name = before.name if before is not None else Path(_printable(file)).stem
            try:
                table = parse_table(_read_file(directory / file))
                name = table.name
                table.check_model(self._identity)
                if name == self._default and table.sha256 != self.now.tables[name].sha256:
                    self._check(table)
            except FileNotFoundError:
                continue  # removed since the listing, or a broken link
            # A damaged file may make a library raise any of these.
            except (A2SFError, OSError, ValueError, RecursionError) as error:
                if before is not None:
                    by_file[file] = before
                refused.append((name, _refusal(file, error)))
            else:
                valid[file] = table
        file_of_name = {table.name: file for file, table in by_file.items()}
        # A file that already serves a name has priority over another file with that name.
        for file in sorted(valid, key=lambda file: (not self._served(file, valid[file]), file)):
            table = valid[file]
            if file_of_name.setdefault(table.name, file) == file:
                by_file[file] = table
            else:
                other = _printable(file_of_name[table.name])
                why = f"another file, {other}, has the name {table.name!r}"
                refused.append((table.name, _refusal(file, TableInvalid(why))))
        default = self.now.tables[self._default] if self._default is not None else None
        self._default_without_file = (
            default if default is not None and default.name not in file_of_name else None
        )
        self._by_file, self._refused, self._last_stamp = by_file, refused, stamp
        past = self.now
        self._publish()
        return _compare_and_log(past, self.now)

    def _served(self, file: str, table: AlphaTable) -> bool:
        return file in self._by_file and self._by_file[file].name == table.name

    def _publish(self) -> None:
        tables = {table.name: table for table in self._by_file.values()}
        refused: dict[str, TableError] = {}
        for name, error in self._refused:
            first = refused.get(name)
            refused[name] = type(first)(f"{first}; {error}") if first is not None else error
        if self._default_without_file is not None:
            name = self._default_without_file.name
            tables[name] = self._default_without_file
            gone = TableError(f"no file has alpha table {name!r} any more; it stays as the default")
            refused.setdefault(name, gone)
        self.now = TableStore(
            dict(sorted(tables.items())), dict(sorted(refused.items())), self._default
        )


def _printable(file: str) -> str:
    """Replace the bytes of a file name that are not valid text, so that it can be sent."""
    return os.fsencode(file).decode(errors="replace")


def _is_table(file: str) -> bool:
    return file.endswith(".json") and not file.startswith(".")


def _directory_stamp(directory: Path) -> object:
    """Return the state of a directory and its tables without reading files; None: unreadable."""
    try:
        entries = [entry for entry in directory.iterdir() if _is_table(entry.name)]
        seen = directory.stat()
    except OSError:
        return None
    return (seen.st_dev, seen.st_ino), {entry.name: files.stamp(entry) for entry in entries}


def _read_file(path: Path) -> bytes:
    try:
        return files.read_limited(path, MAX_FILE_BYTES)
    except files.UnreadableFile as error:
        raise TableInvalid(str(error)) from None


def _refusal(file: str, error: Exception) -> TableError:
    """Make the error of a file. It names the file only: clients must not see directory paths."""
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if len(why) > MAX_REASON_CHARACTERS:
        why = f"{why[:MAX_REASON_CHARACTERS]}..."
    kind = type(error) if isinstance(error, TableError) else TableError
    return kind(f"alpha table {_printable(file)}: {why}")


def _compare_and_log(before: TableStore, now: TableStore) -> Reloaded:
    """Compare two states, and log what is new."""
    old, new = before.tables, now.tables
    reloaded = Reloaded(
        added=tuple(name for name in new if name not in old),
        changed=tuple(n for n in new if n in old and new[n].sha256 != old[n].sha256),
        removed=tuple(name for name in old if name not in new),
        refused=now.refused,
        etag=now.etag,
    )
    _log_tables("alpha table added", reloaded.added, new)
    _log_tables("alpha table changed", reloaded.changed, new)
    _log_tables("alpha table removed", reloaded.removed, old)
    for name, error in now.refused.items():
        if str(error) != str(before.refused.get(name)):
            log.warning("alpha table refused", table=name, reason=str(error))
    return reloaded


def _log_tables(event: str, names: Iterable[str], tables: Mapping[str, AlphaTable]) -> None:
    for name in names:
        log.info(event, table=name, sha256=tables[name].sha256)
