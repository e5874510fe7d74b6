"""Alpha tables: valid ones are served by name, invalid ones are refused with the reason."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from a2sf.errors import (
    InvalidArgument,
    NotFound,
    TableCorrupt,
    TableError,
    TableInvalid,
    TableMismatch,
)
from a2sf.model.loader import LoadedModel, load_model
from a2sf.policy import CachePolicy
from a2sf.requests import Sampling
from a2sf.schema import ModelIdentity
from a2sf.tablefile import load_table, save_table
from service.backend.default_table import row_shape
from service.backend.loading import load_core
from service.backend.tables import TableCatalog
from service.client.results import Completion
from service.config.options import ServerOptions
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from tests.service.conftest import StartServer
from tests.tables import make_table

GREEDY: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "ignore_eos": True}


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


def test_invalid_files_are_logged_and_do_not_affect_other_files(
    directory: Path, identity: ModelIdentity
) -> None:
    with capture_logs() as lines:
        store = TableCatalog(directory, identity).now
    assert list(store.tables) == ["good"]
    assert list(store.refused) == ["cut", "foreign"]
    by_table = {line["table"]: line for line in lines}
    assert (by_table["good"]["event"], by_table["good"]["log_level"]) == (
        "alpha table added",
        "info",
    )
    for name, reason in (("cut", "cut.json: .*cut short"), ("foreign", "fingerprint")):
        assert (by_table[name]["event"], by_table[name]["log_level"]) == (
            "alpha table refused",
            "warning",
        )
        assert re.search(reason, by_table[name]["reason"])


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
def test_an_unserved_table_name_gets_the_reason(
    directory: Path, identity: ModelIdentity, name: str, error: type[Exception], reason: str
) -> None:
    store = TableCatalog(directory, identity).now
    with pytest.raises(error, match=reason) as caught:
        store.lookup(name)
    assert str(directory) not in str(caught.value)


def test_a_second_file_with_the_same_table_name_is_refused(
    directory: Path, identity: ModelIdentity
) -> None:
    save_table(make_table(identity, name="good", budget=30), directory / "z.json")
    store = TableCatalog(directory, identity).now
    assert store.lookup("good").policy.budget == 24
    assert str(store.refused["good"]) == (
        "alpha table z.json: another file, any-name.json, has the name 'good'"
    )


async def test_a_table_is_listed_fetched_and_used(
    start_server: StartServer, directory: Path
) -> None:
    server, client, _ = await start_server(tables=directory)
    mine = server.core.tables.now.lookup("good")
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


async def test_requests_for_a_refused_table_get_the_same_reason(
    start_server: StartServer, directory: Path
) -> None:
    server, client, _ = await start_server(tables=directory)
    reason = str(server.core.tables.now.refused["foreign"])
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
def test_an_unusable_default_table_fails_the_start(
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


SHARES = ((6.0, 2.0), (1.0, 1.0), (1.0, 1.0))


@pytest.fixture
def shaped(tmp_path: Path, identity: ModelIdentity) -> Path:
    """Tables that give the first layer four times the slots of others, its heads 3 to 1."""
    folder = tmp_path / "shaped"
    folder.mkdir()
    shares = {"head_share": SHARES, "recent": 0, "sinks": 0}
    save_table(make_table(identity, name="fixed", budget=30, **shares), folder / "fixed.json")
    ratio = make_table(identity, name="ratio", budget=None, budget_ratio=0.2, **shares)
    save_table(ratio, folder / "ratio.json")
    return folder


async def test_a_default_table_of_unequal_heads_shapes_the_rows(
    start_server: StartServer, shaped: Path
) -> None:
    with capture_logs() as lines:
        server, client, _ = await start_server(
            tables=shaped, default_table="ratio", slots=60, default_budget=30
        )
        flat, _, _ = await start_server(slots=60)
    assert server.core.engine.kv_slab_bytes == flat.core.engine.kv_slab_bytes
    loaded = [line for line in lines if line["event"] == "loaded"]
    assert [line["shape"] for line in loaded] == ["ratio:30-180", "flat"]
    assert [line["slots"] for line in loaded] == [60, 60]

    answer = await client.generate([7] * 280, max_new_tokens=20, ignore_eos=True)
    assert answer.started.head_budgets == ((180, 60), (30, 30), (30, 30))
    assert answer.started.head_recents == ((0, 0),) * 3
    cache = answer.finished.cache
    assert (cache.budget, cache.kept_tokens, cache.evicted_tokens) == (60, 60, 239)
    other = CachePolicy(preset="h2o", budget=30)
    answer = await client.generate("x", max_new_tokens=2, cache_policy=other)
    assert answer.started.head_budgets == ((30, 30),) * 3
    assert answer.started.head_recents == ((13, 13),) * 3
    with pytest.raises(
        InvalidArgument, match="31 tokens in every head; layer 1 head 0 has 30"
    ) as caught:
        await client.generate(
            "x", max_new_tokens=2, cache_policy=other.model_copy(update={"budget": 31})
        )
    assert "(rows follow head_share); lower budget or raise --slots" in str(caught.value)
    with pytest.raises(InvalidArgument, match="layer 0 head 0 183 slots; layer 0 head 0 has 180"):
        await client.generate([7] * 285, max_new_tokens=20)


async def test_the_slots_named_by_the_error_serve_requests_of_every_length(
    start_server: StartServer, shaped: Path
) -> None:
    options = {"tables": shaped, "default_table": "fixed", "default_budget": 8}
    with pytest.raises(
        InvalidArgument, match=r"layer \d head \d gets 29.*give --slots 60 or more$"
    ):
        await start_server(**options, slots=59)
    _, client, _ = await start_server(**options, slots=60)
    for prompt in (1, 27, 28, 29, 40, 60, 90, 118, 119, 200):
        answer = await client.generate([7] * prompt, max_new_tokens=2, ignore_eos=True)
        assert sum(map(sum, answer.started.head_budgets)) == 30 * 6


async def test_a_request_with_another_split_is_served_if_every_head_fits(
    start_server: StartServer, shaped: Path, identity: ModelIdentity
) -> None:
    shares = ((2.0, 6.0), (1.0, 1.0), (1.0, 1.0))
    swapped = make_table(identity, name="swapped", head_share=shares, recent=0, sinks=0, budget=20)
    save_table(swapped, shaped / "swapped.json")
    _, client, _ = await start_server(
        tables=shaped, default_table="ratio", slots=60, default_budget=30
    )

    async def answer(**policy: int) -> Completion:
        requested_policy = CachePolicy(table="swapped", **policy)
        return await client.generate(
            [7] * 280, max_new_tokens=20, cache_policy=requested_policy, **GREEDY
        )

    # The second head of the first layer has 60 slots, and gets three times the mean.
    alone, beside = await answer(), await asyncio.gather(answer(), answer(budget=10))
    assert alone.started.head_budgets == ((20, 60), (10, 10), (10, 10))
    assert [other.started.budget for other in beside] == [20, 10]
    assert beside[0].text == alone.text
    assert alone.finished.cache.kept_tokens == 20
    with pytest.raises(
        InvalidArgument,
        match=r"^input\.cache_policy\.budget: budget is 21 tokens per head on average, and "
        "head_share gives layer 0 head 1 63 slots; layer 0 head 1 has 60 slots",
    ):
        await answer(budget=21)


async def test_get_model_and_tables_list_the_slots_of_each_head(
    start_server: StartServer, shaped: Path
) -> None:
    _, client, address = await start_server(
        tables=shaped, default_table="ratio", slots=60, default_budget=30
    )
    assert (await client.get_model()).head_slots == ((180, 60), (30, 30), (30, 30))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.ModelServiceStub(channel)
        model = await stub.GetModel(pb.GetModelRequest())
        tables = {
            name: (await stub.GetAlphaTable(pb.GetAlphaTableRequest(name=name))).table
            for name in ("fixed", "ratio")
        }
    # For clients from before slots were dealt to heads.
    assert list(model.layer_slots) == [120, 30, 30]
    for table in tables.values():
        assert tuple(tuple(layer.shares) for layer in table.head_share) == SHARES
        assert list(table.layer_share) == [4.0, 1.0, 1.0]
    assert [list(layer.tokens) for layer in tables["fixed"].head_budgets] == [
        [90, 30],
        [15, 15],
        [15, 15],
    ]
    assert not tables["ratio"].head_budgets


def test_without_a_default_budget_requests_get_the_slots_of_the_narrowest_head(
    shaped: Path,
) -> None:
    options = ServerOptions(tables=shaped, default_table="ratio", slots=60)
    assert options.default_budget_for(None) == 60
    table = load_table(shaped / "ratio.json")
    row = row_shape(options, table, 10**6)
    assert options.default_budget_for(row) == 30
    assert options.engine_config(row).default_policy.budget == 30
    assert options.model_copy(update={"slots": 1024}).default_budget_for(None) == 1024
    narrow = options.model_copy(update={"slots": 8})
    with pytest.raises(
        InvalidArgument, match=r"newest token are 5 tokens, .* gets 4, .*; give --slots 10 or more$"
    ):
        row_shape(narrow, table, 10**6)
    assert row_shape(narrow.model_copy(update={"slots": 10}), table, 10**6) is not None
    with pytest.raises(InvalidArgument, match=r"^--slots: 4; accepted: 5 "):
        narrow.model_copy(update={"slots": 4}).engine_config(None)


async def test_a_row_gives_slots_that_the_longest_sequence_cannot_fill_to_the_other_heads(
    start_server: StartServer, tiny_model_dir: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    """Without a limit, the first of these heads would get 768 of 256 slots, for 512 tokens."""
    shape = {"head_share": SHARES, "budget": None, "budget_ratio": 0.2, "recent": 0, "sinks": 0}
    save_table(make_table(tiny_model.identity, name="ratio", **shape), tmp_path / "ratio.json")
    server, client, _ = await start_server(
        model=str(tiny_model_dir), tables=tmp_path, default_table="ratio", slots=256
    )
    assert tiny_model.shape.max_context == 512
    assert server.core.config.head_slots(3, 2) == ((512, 341), (171, 171), (170, 171))
    # The longest request needs all of the row, with the largest budget.
    answer = await client.generate([7] * 502, max_new_tokens=10, cache_policy={"budget": 256})
    assert answer.started.head_budgets == ((512, 341), (171, 171), (170, 171))


async def test_rows_beyond_the_context_are_allocated_with_a_warning(
    start_server: StartServer, tiny_model_dir: Path
) -> None:
    with capture_logs() as lines:
        await start_server(model=str(tiny_model_dir), slots=512)
        await start_server(model=str(tiny_model_dir), slots=513)
    (warning,) = [line for line in lines if line["event"].startswith("rows are longer")]
    assert (warning["log_level"], warning["slots"]) == ("warning", 513)
    assert warning["advice"] == "memory is unused; lower --slots to 512"


@pytest.mark.parametrize(
    ("table", "budget", "says"),
    [
        ("ratio", 31, "--default-budget is 31 tokens.*--slots 62 .*--default-budget 30 or less"),
        ("fixed", 31, "--default-budget is 31 tokens.*--slots 62 .*--default-budget 30 or less"),
        ("fixed", 50, "--default-budget is 50 tokens.*--slots 100 .*--default-budget 30 or less"),
    ],
)
def test_a_default_budget_above_the_narrowest_head_fails_the_start(
    long_model_dir: Path, shaped: Path, table: str, budget: int, says: str
) -> None:
    options = ServerOptions(
        model=str(long_model_dir),
        device="cpu",
        tables=shaped,
        default_table=table,
        slots=60,
        default_budget=budget,
    )
    with pytest.raises(InvalidArgument, match=says):
        load_core(options)


def test_a_file_changed_by_hand_is_refused(directory: Path, identity: ModelIdentity) -> None:
    path = directory / "any-name.json"
    document = json.loads(path.read_text())
    document["policy"]["budget"] = 25
    path.write_text(json.dumps(document))
    store = TableCatalog(directory, identity).now
    with pytest.raises((TableCorrupt, TableInvalid), match="sha256"):
        store.lookup("any-name")
