"""A PostgreSQL server of one's own: in a temporary directory, on a socket within it."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier


class Server:
    """A running server; not as root, as it demands."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries = binaries
        self._directory = directory
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:
            user = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
            shutil.chown(directory, user.pw_uid, user.pw_gid)
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._run("initdb", "--auth=trust", "--username=fit", "--no-sync", "--encoding=UTF8")
        # A restarted process finds in the files what was committed; only a lost machine does not.
        settings = f"listen_addresses = ''\nunix_socket_directories = '{directory}'\nfsync = off\n"
        with (directory / "data" / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(settings)
        self.start()

    def database(self, name: str) -> str:
        """Make an empty database, and return its address."""
        server = f"host={self._directory} user=fit dbname=postgres"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(SQL("create database {}").format(Identifier(name)))
        return f"postgresql://fit:secret@/{name}?host={self._directory}"

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", f"--log={self._directory}/log")

    def stop(self) -> None:
        """Stop as if it had crashed, without ending what its clients began."""
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate")

    def restart(self) -> None:
        self._run("pg_ctl", "restart", "--wait", "--mode=immediate", f"--log={self._directory}/log")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._binaries / program, f"--pgdata={self._directory}/data", *arguments],
            check=True,
            timeout=60,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **self._user,
        )


def _binaries() -> Path:
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    for place in reversed(places):
        if (place / "initdb").exists() and (place / "pg_ctl").exists():
            return place
    pytest.skip("no PostgreSQL server; on Debian and Ubuntu: apt-get install postgresql")


@contextmanager
def postgresql() -> Iterator[Server]:
    """A server for one test, which is skipped where PostgreSQL is not installed."""
    binaries = _binaries()
    # Not under pytest's own directory, which other users cannot enter; and socket paths are short.
    directory = Path(tempfile.mkdtemp(prefix="a2sf-pg-"))
    try:
        server = Server(binaries, directory)
        try:
            yield server
        finally:
            if (directory / "data" / "postmaster.pid").exists():
                server.stop()
    finally:
        shutil.rmtree(directory)
