"""Killed writers and readers of tables leave whole files."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from a2sf.policy import CachePolicy
from a2sf.tablefile import save_table
from service.client import Client
from tests.service.backend.test_table_catalog import catalog, put
from tests.service.conftest import StartProcess, StartServer
from tests.tables import make_table

pytestmark = pytest.mark.slow

WRITER = """
import os, sys
from pathlib import Path
from a2sf.tablefile import load_table, save_table
directory, *sources = map(Path, sys.argv[1:])
tables = [load_table(source) for source in sources]
for line in sys.stdin:
    pid = os.fork()
    while pid == 0:
        for table in tables:
            save_table(table, directory / "t.json")
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""

RELOADING = """
import threading
from service.__main__ import main
from service.backend.tables import TableCatalog
set_default = TableCatalog.set_default
def set_default_and_read_on(self, *arguments):
    set_default(self, *arguments)
    def read_on():
        while True:
            self.reload()
    threading.Thread(target=read_on, daemon=True).start()
TableCatalog.set_default = set_default_and_read_on
main()
"""


class Writer:
    """A process whose children write tables in turns to one file until they are killed."""

    def __init__(self, directory: Path, *tables: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory), *map(str, tables)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._child: int | None = None

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._child = int(self._line())

    def kill(self) -> None:
        assert self._child is not None
        os.kill(self._child, signal.SIGKILL)
        assert self._line() == "ended\n"
        self._child = None

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        if self._child is not None:
            self.kill()
        self._process.communicate(timeout=30)


@pytest.fixture
def start_writer() -> Iterator[Callable[..., Writer]]:
    started: list[Writer] = []

    def start(directory: Path, *tables: Path) -> Writer:
        started.append(Writer(directory, *tables))
        return started[-1]

    yield start
    for writer in started:
        writer.close()


def test_a_killed_writer_leaves_a_whole_table(
    tmp_path: Path, start_writer: Callable[..., Writer]
) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    digests = {
        put(tmp_path, "a", "t").sha256,
        put(tmp_path, "b", "t", 25).sha256,
    }
    put(folder, "t.json", "t")
    writer = start_writer(folder, tmp_path / "a", tmp_path / "b")
    tables, seen, rng = catalog(folder), set[str](), random.Random(0)
    for _ in range(60):
        writer.start()
        # Read while it is written, then killed at any moment.
        end = time.monotonic() + rng.uniform(0.0, 0.3)
        while time.monotonic() < end:
            assert tables.reload().refused == {}
            seen.add(tables.now.tables["t"].sha256)
        writer.kill()
        now = catalog(folder).now
        assert (list(now.tables), now.refused) == (["t"], {})
        assert now.tables["t"].sha256 in digests
    left = [path for path in folder.iterdir() if path.name != "t.json"]
    assert left, "some were killed in the middle of a file"
    assert all(path.suffix == ".tmp" and path.name.startswith(".") for path in left)
    assert seen == digests


@pytest.mark.timeout(240)
async def test_a_server_killed_while_reading_tables_starts_again_with_a_whole_one(
    tmp_path: Path,
    start_server: StartServer,
    start_process: StartProcess,
    start_writer: Callable[..., Writer],
) -> None:
    server, _, _ = await start_server()
    identity = server.core.model.identity
    folder = tmp_path / "tables"
    folder.mkdir()
    versions = [make_table(identity, name="t", budget=budget) for budget in (24, 25)]
    for number, table in enumerate(versions):
        save_table(table, tmp_path / str(number))
    save_table(versions[0], folder / "t.json")
    arguments = ("--tables", str(folder), "--default-table", "t")
    writer = start_writer(folder, tmp_path / "0", tmp_path / "1")
    for _ in range(3):
        writer.start()
        process = start_process(*arguments, program=("-c", RELOADING))
        await process.logged("alpha table changed")
        process.process.kill()
        await process.ended()
        writer.kill()
        (tmp_path / "port").unlink(missing_ok=True)
    process = start_process(*arguments)
    async with Client(await process.address()) as client:
        answer = await client.generate(
            "x", max_new_tokens=3, cache_policy=CachePolicy(table="t"), ignore_eos=True
        )
        listing = await client.list_alpha_tables()
    assert answer.started.table_sha256 in {table.sha256 for table in versions}
    assert listing.refused == {}
