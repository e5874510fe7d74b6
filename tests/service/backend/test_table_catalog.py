"""Reloading tables while serving: what each change does, and which may be the default."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from a2sf.cache.budgets import resolve
from a2sf.cache.slot_shares import Shares, slots_per_head
from a2sf.errors import (
    Conflict,
    InvalidArgument,
    NotFound,
    TableCorrupt,
    TableError,
    TableInvalid,
)
from a2sf.policy import CachePolicy, Heads
from a2sf.schema import AlphaTable
from a2sf.tablefile import MAX_FILE_BYTES, save_table
from service.backend.default_table import check_default
from service.backend.tables import TableCatalog
from service.config.options import ServerOptions
from tests.tables import IDENTITY, make_table

UNFIT = 99
"""Budget of the tables that may be served, but not as the default."""


def check(table: AlphaTable) -> None:
    if table.policy.budget == UNFIT:
        raise TableInvalid(f"alpha table {table.name!r} cannot be the default")


def catalog(directory: Path, default: str | None = None) -> TableCatalog:
    made = TableCatalog(directory, IDENTITY)
    made.set_default(default, check)
    return made


def put(directory: Path, file: str, name: str, budget: int = 24) -> AlphaTable:
    table = make_table(IDENTITY, name=name, budget=budget)
    save_table(table, directory / file)
    return table


def served(tables: TableCatalog) -> dict[str, int | None]:
    """The budget of each table that is served."""
    return {name: table.policy.budget for name, table in tables.now.tables.items()}


def test_a_reload_lists_added_changed_removed_and_refused_tables(tmp_path: Path) -> None:
    for name in ("gone", "same", "worse", "other"):
        put(tmp_path, f"{name}.json", name)
    tables = catalog(tmp_path)
    before = tables.now
    put(tmp_path, "new.json", "new")
    put(tmp_path, "other.json", "other", 25)
    (tmp_path / "worse.json").write_text("{")
    (tmp_path / "gone.json").unlink()
    with capture_logs() as lines:
        reloaded = tables.reload()
    assert (reloaded.added, reloaded.changed, reloaded.removed) == (("new",), ("other",), ("gone",))
    assert list(reloaded.refused) == ["worse"]
    assert str(reloaded.refused["worse"]).startswith("alpha table worse.json: not whole JSON")
    assert reloaded.etag == tables.now.etag != before.etag
    assert served(tables) == {"new": 24, "other": 25, "same": 24, "worse": 24}
    assert list(before.tables) == ["gone", "other", "same", "worse"], "a store never changes"
    assert {(line["event"], line["table"], line["log_level"]) for line in lines} == {
        ("alpha table added", "new", "info"),
        ("alpha table changed", "other", "info"),
        ("alpha table removed", "gone", "info"),
        ("alpha table refused", "worse", "warning"),
    }
    with capture_logs() as lines:
        tables.reload()
    assert lines == [], "what has been said is not said again"


def test_a_damaged_file_is_refused_under_its_previous_table_name(
    tmp_path: Path,
) -> None:
    put(tmp_path, "file.json", "table")
    tables = catalog(tmp_path)
    (tmp_path / "file.json").write_text("")
    tables.reload()
    assert list(tables.now.refused) == ["table"]
    assert tables.now.lookup("table").policy.budget == 24
    assert list(catalog(tmp_path).now.refused) == ["file"], "a new start knows only the file"


def test_the_default_table_outlives_its_file_until_another_is_activated(tmp_path: Path) -> None:
    put(tmp_path, "a.json", "a")
    put(tmp_path, "b.json", "b")
    tables = catalog(tmp_path, "a")
    (tmp_path / "a.json").unlink()
    reloaded = tables.reload()
    assert reloaded.removed == ()
    assert "stays as the default" in str(reloaded.refused["a"])
    assert served(tables) == {"a": 24, "b": 24}
    tables.activate("b", reloaded.etag)
    assert served(tables) == {"b": 24}
    assert tables.now.refused == {}
    with pytest.raises(NotFound, match="served: b"):
        tables.activate("a", tables.now.etag)


def test_a_default_without_a_file_is_replaced_by_the_next_file_of_its_name(tmp_path: Path) -> None:
    put(tmp_path, "a.json", "a")
    tables = catalog(tmp_path, "a")
    (tmp_path / "a.json").unlink()
    tables.reload()
    put(tmp_path, "other.json", "a", UNFIT)
    reloaded = tables.reload()
    assert served(tables) == {"a": 24}
    assert "cannot be the default" in str(reloaded.refused["a"])
    put(tmp_path, "other.json", "a", 25)
    assert tables.reload().changed == ("a",)
    assert tables.now.refused == {}


def test_with_two_files_of_one_name_the_served_one_stays_and_both_reasons_are_listed(
    tmp_path: Path,
) -> None:
    put(tmp_path, "z.json", "name", 25)
    tables = catalog(tmp_path)
    put(tmp_path, "a.json", "name", 26)
    save_table(
        make_table(IDENTITY.model_copy(update={"fingerprint": "f" * 64}), name="name"),
        tmp_path / "b.json",
    )
    reloaded = tables.reload()
    assert served(tables) == {"name": 25}
    reason = str(reloaded.refused["name"])
    assert "a.json: another file, z.json, has the name 'name'" in reason
    assert "alpha table b.json: " in reason
    (tmp_path / "z.json").unlink()
    assert tables.reload().changed == ("name",)
    assert served(tables) == {"name": 26}


def test_the_same_state_has_the_same_etag_and_another_state_another(tmp_path: Path) -> None:
    put(tmp_path, "a.json", "a")
    tables = catalog(tmp_path)
    first = tables.now.etag
    assert catalog(tmp_path).now.etag == first == tables.reload().etag
    (tmp_path / "bad.json").write_text("{")
    assert tables.reload().etag == first, "what is refused changes nothing"
    second = tables.activate("a", first).etag
    put(tmp_path, "a.json", "a", 25)
    third = tables.reload().etag
    assert len({first, second, third}) == 3
    put(tmp_path, "a.json", "a", 24)
    tables.reload()
    assert tables.activate("", second).etag == first


def test_activating_needs_the_current_etag(tmp_path: Path) -> None:
    put(tmp_path, "a.json", "a")
    put(tmp_path, "unfit.json", "unfit", UNFIT)
    (tmp_path / "bad.json").write_text("{")
    tables = catalog(tmp_path)
    etag = tables.now.etag
    refusals: list[tuple[str, str, type[Exception], str]] = [
        ("a", "", InvalidArgument, "^etag: missing"),
        ("a", "0" * 16, Conflict, "call ListAlphaTables again"),
        ("missing", etag, NotFound, "served: a, unfit"),
        ("../a", etag, NotFound, "served: a, unfit"),
        ("bad", etag, TableCorrupt, "cut short"),
        ("unfit", etag, TableInvalid, "cannot be the default"),
    ]
    for name, given_etag, error, reason in refusals:
        with pytest.raises(error, match=reason):
            tables.activate(name, given_etag)
        assert (tables.now.default, tables.now.etag) == (None, etag)
    now = tables.activate("a", etag)
    assert (now.default, now) == ("a", tables.now)
    with pytest.raises(Conflict):
        tables.activate("", etag)
    assert tables.activate("", now.etag).default is None


def test_a_start_with_an_unsuitable_default_table_fails(tmp_path: Path) -> None:
    put(tmp_path, "unfit.json", "unfit", UNFIT)
    with pytest.raises(TableInvalid, match="cannot be the default"):
        catalog(tmp_path, "unfit")
    with pytest.raises(NotFound):
        catalog(tmp_path, "missing")


def test_a_directory_that_cannot_be_listed_changes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "tables"
    directory.mkdir()
    put(directory, "a.json", "a")
    tables = catalog(directory)
    before = tables.now
    directory.rename(tmp_path / "elsewhere")
    assert tables.outdated()
    with pytest.raises(NotFound, match="No such file or directory") as caught:
        tables.reload()
    assert str(tmp_path) not in str(caught.value)
    assert tables.now is before
    (tmp_path / "elsewhere").rename(directory)
    assert not tables.outdated()
    with pytest.raises(NotFound, match="without a directory"):
        TableCatalog(None, IDENTITY).reload()


def test_only_regular_files_of_limited_size_are_read(tmp_path: Path) -> None:
    directory = tmp_path / "tables"
    directory.mkdir()
    os.mkfifo(directory / "pipe.json")
    (directory / "folder.json").mkdir()
    (directory / "device.json").symlink_to("/dev/zero")
    with (directory / "large.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    (directory / "dangling.json").symlink_to("nowhere")
    (directory / "infinite.json").write_text('{"a": 1e999}')
    (directory / "surrogate.json").write_text('{"a": "\\ud800"}')
    (directory / "deep.json").write_text("[" * 100_000)
    put(directory, ".hidden.json", "hidden")
    put(directory, "notes.txt", "notes")
    put(tmp_path, "elsewhere", "linked")
    (directory / "linked.json").symlink_to(tmp_path / "elsewhere")
    now = catalog(directory).now
    assert list(now.tables) == ["linked"]
    reasons = {name: str(error) for name, error in now.refused.items()}
    bad = ["deep", "device", "folder", "infinite", "large", "pipe", "surrogate"]
    assert list(reasons) == bad
    assert reasons["folder"] == "alpha table folder.json: Is a directory"
    for name in ("device", "pipe"):
        assert reasons[name] == f"alpha table {name}.json: not a regular file"
    assert reasons["large"] == f"alpha table large.json: larger than {MAX_FILE_BYTES} bytes"
    assert all(isinstance(error, TableError) for error in now.refused.values())


def test_a_changed_table_makes_the_catalog_outdated(tmp_path: Path) -> None:
    put(tmp_path, "a.json", "a")
    tables = catalog(tmp_path)
    (tmp_path / "notes.txt").write_text("no table")
    assert not tables.outdated()
    changes: list[Callable[[], object]] = [
        lambda: put(tmp_path, "a.json", "a"),
        lambda: (tmp_path / "a.json").write_text("{"),
        lambda: (tmp_path / "a.json").rename(tmp_path / "b.json"),
        (tmp_path / "b.json").unlink,
    ]
    for change in changes:
        change()
        assert tables.outdated()
        tables.reload()
        assert not tables.outdated()


# Which tables may follow the default in the rows that are there.

weight = st.sampled_from((0.5, 1.0, 1.5, 2.0, 4.0))
shares = st.one_of(
    st.just(((1.0, 1.0),) * 3),
    st.tuples(*[weight.map(lambda share: (share, share))] * 3),
    st.tuples(*[st.tuples(weight, weight)] * 3),
)


def by_layer(*layers: float) -> tuple[tuple[float, ...], ...]:
    return tuple((share, share) for share in layers)


@given(dealt=shares, wanted=shares, slots=st.integers(12, 40), budget=st.integers(5, 40))
# Too long for the narrowest layer while nothing is evicted, and for a middle one at some lengths.
@example(dealt=by_layer(4.0, 1.0, 1.0), wanted=by_layer(2.0, 1.0, 1.0), slots=20, budget=11)
@example(dealt=by_layer(2.0, 1.0, 1.0), wanted=by_layer(4.0, 2.0, 1.0), slots=39, budget=28)
@settings(max_examples=150)
def test_an_accepted_default_table_fits_requests_of_every_length(
    dealt: Shares, wanted: Shares, slots: int, budget: int
) -> None:
    identity = IDENTITY.model_copy(update={"num_layers": 3})
    table = make_table(identity, head_share=wanted, budget=budget, sinks=0, recent=0)
    options = ServerOptions(slots=slots)
    longest = 3 * budget + 2
    rows = slots_per_head(slots, dealt, longest)

    def fits(rows: Heads) -> bool:
        try:
            for length in range(1, longest + 1):
                resolve(
                    CachePolicy(),
                    table=table,
                    server=CachePolicy(table=table.name),
                    length=length,
                    slots=rows,
                    num_layers=3,
                    num_kv_heads=2,
                )
        except InvalidArgument:
            return False
        return True

    try:
        check_default(options, rows, longest, table)
    except TableInvalid:
        # Whole numbers are dealt by rounding: what a slot less would not hold may be refused.
        assert not fits(tuple(tuple(slots - 1 for slots in row) for row in rows))
    else:
        assert fits(rows)


@pytest.mark.parametrize(
    ("dealt", "settings", "reason"),
    [
        ((1.0, 1.0), {"budget_ratio": 0.2}, None),
        (
            (1.0, 1.0),
            {"budget_ratio": 0.2, "layer_share": (3.0, 1.0)},
            "head 0 has 40 slots, .* 60",
        ),
        ((3.0, 1.0), {"budget_ratio": 0.2, "layer_share": (3.0, 1.0)}, None),
        (
            (3.0, 1.0),
            {"budget_ratio": 0.2},
            "not split by .*: layer 0 head 0 has 60 slots, .* 40",
        ),
        ((1.0, 1.0), {"budget": 20, "layer_share": (3.0, 1.0)}, None),
        (
            (1.0, 1.0),
            {"budget": 28, "layer_share": (3.0, 1.0)},
            "up to 42 slots.* 40; .*--slots 56",
        ),
        ((3.0, 1.0), {"budget": 21}, "up to 21 slots of layer 1 head 0, which has 20"),
        (
            (3.0, 1.0),
            {"budget": 24, "layer_share": (2.0, 1.0)},
            "up to 24 slots of layer 1 head 0, which has 20; .*--slots 36",
        ),
        ((1.0, 1.0), {"budget": 20, "sinks": 15, "recent": 5}, "need 21; raise budget"),
        # The small share of 4 slots is lifted to the 6 that it needs.
        (
            (1.0, 1.0),
            {"budget": 20, "layer_share": (9.0, 1.0), "sinks": 2, "recent": 3},
            None,
        ),
    ],
)
def test_accepted_default_tables_depend_on_the_split_of_rows(
    dealt: tuple[float, ...], settings: dict[str, Any], reason: str | None
) -> None:
    budget = {"budget": None} if "budget_ratio" in settings else {}
    table = make_table(IDENTITY, **{"sinks": 0, "recent": 0, **budget, **settings})
    options = ServerOptions(slots=40)
    rows = slots_per_head(40, by_layer(*dealt), 1000)
    if reason is None:
        check_default(options, rows, 1000, table)
        return
    with pytest.raises(TableInvalid, match=f"cannot be the default: .*{reason}"):
        check_default(options, rows, 1000, table)
