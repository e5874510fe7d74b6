"""Alpha tables: good ones served by name, bad ones refused with the reason, none outside."""

import json
import logging
from pathlib import Path

import pytest

from a2sf.errors import NotFound, TableCorrupt, TableError, TableInvalid, TableMismatch
from a2sf.models import load_model
from a2sf.policy import CachePolicy
from a2sf.schema import ModelIdentity, save_table
from service.options import ServerOptions, load_core
from service.tables import TableStore
from tests.service.conftest import StartServer
from tests.tables import make_table


@pytest.fixture(scope="module")
def identity(long_model_dir: Path) -> ModelIdentity:
    return load_model(str(long_model_dir), device="cpu").identity


@pytest.fixture
def directory(tmp_path: Path, identity: ModelIdentity) -> Path:
    """A good table, one cut short, one for another model, and what is no table at all."""
    folder = tmp_path / "tables"
    folder.mkdir()
    save_table(make_table(identity, name="good"), folder / "any-name.json")
    other = identity.model_copy(update={"fingerprint": "f" * 64})
    save_table(make_table(other, name="foreign"), folder / "foreign.json")
    text = (folder / "any-name.json").read_text()
    (folder / "cut.json").write_text(text[: len(text) // 2])
    (folder / "notes.txt").write_text("no table")
    save_table(make_table(identity, name="outside"), tmp_path / "outside.json")
    return folder


def test_bad_files_are_named_in_the_log_and_stop_no_others(
    directory: Path, identity: ModelIdentity, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        store = TableStore.read(directory, identity)
    assert list(store.tables) == ["good"]
    assert list(store.refused) == ["cut", "foreign"]
    assert "cut.json" in caplog.text
    assert "cut short" in caplog.text
    assert "fingerprint" in caplog.text


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("cut", TableCorrupt, "cut short"),
        ("foreign", TableMismatch, "fingerprint"),
        ("missing", NotFound, "served: good"),
        ("../outside", NotFound, "served: good"),
        ("any-name", NotFound, "served: good"),
    ],
)
def test_a_name_that_cannot_be_served_tells_why(
    directory: Path, identity: ModelIdentity, name: str, error: type[Exception], reason: str
) -> None:
    store = TableStore.read(directory, identity)
    with pytest.raises(error, match=reason) as caught:
        store.lookup(name)
    assert str(directory) not in str(caught.value)


def test_a_name_that_is_taken_is_refused_to_the_second_file(
    directory: Path, identity: ModelIdentity, caplog: pytest.LogCaptureFixture
) -> None:
    save_table(make_table(identity, name="good", budget=30), directory / "z.json")
    with caplog.at_level(logging.WARNING):
        store = TableStore.read(directory, identity)
    assert store.lookup("good").policy.budget == 24
    assert "z.json" in caplog.text
    assert "another file" in caplog.text


async def test_a_table_is_listed_fetched_and_used(
    start_server: StartServer, directory: Path
) -> None:
    server, client, _ = await start_server(tables=directory)
    mine = server.core.tables.lookup("good")
    listing = await client.list_alpha_tables()
    assert listing.served == {"good": mine.sha256}
    assert "fingerprint" in listing.refused["foreign"]
    assert await client.get_alpha_table("good") == mine
    answer = await client.generate(
        "x", max_new_tokens=2, cache_policy=CachePolicy(table="good", recent=3)
    )
    assert answer.started.method == "table"
    assert (answer.started.table_name, answer.started.table_sha256) == ("good", mine.sha256)
    # The request's field goes before the table's, the table's before the server's.
    assert (answer.started.recent, answer.started.budget) == (3, 24)


async def test_a_refused_table_is_refused_to_requests_with_the_same_reason(
    start_server: StartServer, directory: Path
) -> None:
    server, client, _ = await start_server(tables=directory)
    reason = str(server.core.tables.refused["foreign"])
    for call in (
        client.generate("x", max_new_tokens=1, cache_policy=CachePolicy(table="foreign")),
        client.get_alpha_table("foreign"),
    ):
        with pytest.raises(TableMismatch) as caught:
            await call
        assert str(caught.value) == reason
    with pytest.raises(NotFound):
        await client.get_alpha_table("../outside")


async def test_the_default_table_serves_requests_that_name_no_method(
    start_server: StartServer, directory: Path
) -> None:
    _, client, _ = await start_server(tables=directory, default_table="good")
    answer = await client.generate("x", max_new_tokens=2)
    assert (answer.started.method, answer.started.budget) == ("table", 24)
    other = await client.generate("x", max_new_tokens=2, cache_policy=CachePolicy(preset="h2o"))
    assert (other.started.method, other.started.budget) == ("h2o", 32)
    assert (await client.get_model()).default_cache_policy.table == "good"


@pytest.mark.parametrize(
    ("name", "slots", "error"),
    [
        ("missing", 64, NotFound),
        ("foreign", 64, TableError),
        ("cut", 64, TableCorrupt),
        ("good", 23, ValueError),
    ],
)
def test_a_default_table_that_cannot_be_used_stops_the_start(
    directory: Path, long_model_dir: Path, name: str, slots: int, error: type[Exception]
) -> None:
    options = ServerOptions(
        model=str(long_model_dir),
        device="cpu",
        tables=directory,
        default_table=name,
        slots=slots,
        default_budget=8,
    )
    with pytest.raises(error):
        load_core(options)


def test_a_file_changed_by_hand_is_refused(directory: Path, identity: ModelIdentity) -> None:
    path = directory / "any-name.json"
    document = json.loads(path.read_text())
    document["policy"]["budget"] = 25
    path.write_text(json.dumps(document))
    store = TableStore.read(directory, identity)
    with pytest.raises((TableCorrupt, TableInvalid), match="sha256"):
        store.lookup("any-name")
