"""Watching the directory of tables: a new table is served, whatever happens to the directory.

Tests of notifications make the time between checks so long that only a notification can pass them.
"""

import asyncio
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from a2sf.tablefile import save_table
from service.backend import watch as watching
from service.backend.tables import Reloaded, TableCatalog
from tests.service.conftest import WAIT_S, until
from tests.tables import IDENTITY, make_table

NEVER_S = 1000.0
OFTEN_S = 0.2


class Watched:
    """A catalog that follows its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.catalog = TableCatalog(directory, IDENTITY)
        self.reloads: list[Reloaded] = []
        # What is seen here is never ahead of `reloads`, as the catalog is while a reload returns.
        self.seen = self.catalog.now

    def put(self, name: str, budget: int = 24) -> None:
        save_table(make_table(IDENTITY, name=name, budget=budget), self.directory / f"{name}.json")

    def serves(self, **budgets: int) -> bool:
        tables = self.seen.tables
        return {name: table.policy.budget for name, table in tables.items()} == budgets

    async def reload(self) -> Reloaded:
        self.reloads.append(await asyncio.to_thread(self.catalog.reload))
        self.seen = self.catalog.now
        return self.reloads[-1]

    async def noticed(self) -> None:
        """Wait until a change is noticed: from then on the watch is known to be set up."""
        async with asyncio.timeout(WAIT_S):
            while not self.reloads:
                (self.directory / "notes.txt").write_text("poke")
                # Longer than the quiet that the watch waits for.
                await asyncio.sleep(watching.QUIET_MS * 3 / 1000)


@asynccontextmanager
async def following(directory: Path) -> AsyncIterator[Watched]:
    watched = Watched(directory)
    task = asyncio.create_task(watching.watch(watched.catalog, directory, watched.reload))
    try:
        yield watched
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, WAIT_S)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    folder.mkdir()
    return folder


@pytest.fixture
def notifications_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RECHECK_S", NEVER_S)


@pytest.fixture
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RECHECK_S", OFTEN_S)


@pytest.mark.usefixtures("notifications_only")
async def test_changes_in_the_directory_are_served(directory: Path) -> None:
    async with following(directory) as watched:
        await watched.noticed()
        watched.put("a")
        await until(lambda: watched.serves(a=24))
        watched.put("a", 25)
        await until(lambda: watched.serves(a=25))
        (directory / "a.json").write_text("{")
        await until(lambda: "a" in watched.seen.refused)
        assert watched.serves(a=25)
        (directory / "a.json").unlink()
        await until(watched.serves)
    assert [reloaded.added for reloaded in watched.reloads if reloaded.added] == [("a",)]
    assert [reloaded.changed for reloaded in watched.reloads if reloaded.changed] == [("a",)]
    assert [reloaded.removed for reloaded in watched.reloads if reloaded.removed] == [("a",)]


class ConfigMap:
    """A directory as the kubelet fills and swaps it: files link through `..data` to a version."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._versions = 0

    def swap(self, **budgets: int) -> None:
        self._versions += 1
        version = self._directory / f"..version_{self._versions}"
        version.mkdir()
        for name, budget in budgets.items():
            table = make_table(IDENTITY, name=name, budget=budget)
            save_table(table, version / f"{name}.json")
        link, fresh = self._directory / "..data", self._directory / "..data_tmp"
        past = link.resolve() if link.is_symlink() else None
        fresh.symlink_to(version.name)
        fresh.rename(link)
        for name in budgets:
            with suppress(FileExistsError):
                (self._directory / f"{name}.json").symlink_to(f"..data/{name}.json")
        for file in self._directory.glob("*.json"):
            if file.stem not in budgets:
                file.unlink()
        if past is not None:
            shutil.rmtree(past)


@pytest.mark.usefixtures("notifications_only")
async def test_a_swapped_config_map_is_noticed(directory: Path) -> None:
    mounted = ConfigMap(directory)
    mounted.swap(a=24, b=24)
    async with following(directory) as watched:
        assert watched.serves(a=24, b=24)
        await watched.noticed()
        mounted.swap(a=25, b=24)
        await until(lambda: watched.serves(a=25, b=24))
        mounted.swap(a=25, c=26)
        await until(lambda: watched.serves(a=25, c=26))
    assert all(reloaded.refused == {} for reloaded in watched.reloads)


@pytest.mark.usefixtures("frequent_checks")
async def test_a_missing_directory_is_awaited_and_its_tables_stay(
    directory: Path,
) -> None:
    with capture_logs() as lines:
        async with following(directory) as watched:
            watched.put("a")
            await until(lambda: watched.serves(a=24))
            shutil.rmtree(directory)
            await until(lambda: any(line["event"] == "tables not read" for line in lines))
            assert watched.serves(a=24)
            directory.mkdir()
            watched.put("b")
            await until(lambda: watched.serves(b=24))
            # The directory that is there now is the one that is watched.
            watched.put("b", 25)
            await until(lambda: watched.serves(b=25))
    lost = [line for line in lines if line["event"] == "tables not read"]
    assert [line["log_level"] for line in lost] == ["warning"], "said once, not at every look"
    assert "No such file" in lost[0]["reason"]
    assert any(line["event"] == "tables directory is back" for line in lines)


@pytest.mark.usefixtures("frequent_checks")
async def test_a_directory_that_replaces_the_watched_one_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place, budget in ((first, 24), (second, 25)):
        place.mkdir()
        save_table(make_table(IDENTITY, name="a", budget=budget), place / "a.json")
    link = tmp_path / "link"
    link.symlink_to(first)
    async with following(link) as watched:
        await watched.noticed()
        # The next watch will be looked after no more: it must tell.
        monkeypatch.setattr(watching, "RECHECK_S", NEVER_S)
        (tmp_path / "fresh").symlink_to(second)
        (tmp_path / "fresh").rename(link)
        await until(lambda: watched.serves(a=25))
        watched.reloads.clear()
        await watched.noticed()


@pytest.mark.usefixtures("frequent_checks")
async def test_without_system_watches_the_directory_is_polled(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    async def refuse(*_: object, **__: object) -> AsyncGenerator[set[object], None]:
        nonlocal looks
        looks += 1
        raise RuntimeError("no watch left")
        yield set()

    monkeypatch.setattr(watching, "awatch", refuse)
    with capture_logs() as lines:
        async with following(directory) as watched:
            watched.put("a")
            await until(lambda: watched.serves(a=24))
            watched.put("b")
            await until(lambda: watched.serves(a=24, b=24))
            enough = looks + 3
            await until(lambda: looks >= enough)
    (line,) = [each for each in lines if "cannot be watched" in each["event"]]
    assert (line["reason"], line["log_level"]) == ("no watch left", "warning")
    assert len(watched.reloads) == 2, "looking without a change reads nothing"


@pytest.mark.usefixtures("notifications_only")
@pytest.mark.parametrize("there", [True, False], ids=["waiting", "lost"])
async def test_a_watch_can_be_cancelled_at_once(directory: Path, there: bool) -> None:
    async with following(directory) as watched:
        await watched.noticed()
        if not there:
            shutil.rmtree(directory)
            await asyncio.sleep(0.5)
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 5.0
