"""Defaults: the policy of requests that set none, and the lower bound of ratios."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

from a2sf.cache.slot_shares import slots_per_head
from a2sf.errors import InvalidArgument, InvalidRequest, TableInvalid
from a2sf.policy import DEFAULT_METHOD, CachePolicy
from a2sf.schema import AlphaTable, ModelIdentity
from a2sf.tablefile import save_table
from service.backend.default_table import check_default
from service.backend.loading import load_core
from service.config.options import MIN_BUDGET, ServerOptions
from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc as pb_grpc
from service.policy_messages import describe_policy
from tests.service.client.test_terminal import run
from tests.service.conftest import StartProcess, StartServer
from tests.tables import make_table

SHARES = ((6.0, 2.0), (1.0, 1.0), (1.0, 1.0))


@pytest.fixture
def identity(long_model_dir: Path) -> ModelIdentity:
    return load_core(ServerOptions(model=str(long_model_dir), device="cpu")).model.identity


@pytest.fixture
def tables(tmp_path: Path, identity: ModelIdentity) -> Path:
    """Tables whose budget is a fifth of a request, with and without a min_budget."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, floor in [("plain", None), ("forty", 40), ("none", 0)]:
        ratio = {"budget": None, "budget_ratio": 0.2, "min_budget": floor}
        save_table(make_table(identity, name=name, **ratio), folder / f"{name}.json")
    return folder


async def test_a_request_without_a_policy_is_exact_while_it_fits_into_a_row(
    start_server: StartServer,
) -> None:
    with capture_logs() as lines:
        server, client, _ = await start_server(default_budget=None)
    answer = await client.generate([7] * 30, max_new_tokens=20, ignore_eos=True)
    started = answer.started
    assert (started.method, started.alpha, started.budget) == ("a2sf", DEFAULT_METHOD.alpha, 64)
    assert answer.finished.cache.evicted_tokens == 0
    answer = await client.generate([7] * 80, max_new_tokens=20, ignore_eos=True)
    assert answer.started.recent == int((DEFAULT_METHOD.recent_share or 0) * (64 - 4 - 1))
    assert (answer.finished.cache.kept_tokens, answer.finished.cache.evicted_tokens) == (64, 35)
    # The server says so when it starts, and when it is asked.
    expected = DEFAULT_METHOD.model_copy(update={"budget": 64, "min_budget": 16})
    assert (await client.get_model()).default_cache_policy == expected
    (line,) = [line for line in lines if line["event"] == "default policy"]
    assert (line["policy"], line["min_budget"]) == (describe_policy(expected), 16)
    assert server.core.config.default_policy == expected


async def test_a_server_logs_its_default_policy_at_the_start(
    start_process: StartProcess,
) -> None:
    server = start_process("--min-budget", "9")
    await server.address()
    words = describe_policy(DEFAULT_METHOD.model_copy(update={"budget": 32}))
    assert f'event="default policy" policy="{words}" min_budget=9' in server.log


async def test_a_short_request_with_a_ratio_keeps_all_tokens_and_names_the_lower_bound(
    start_server: StartServer, tables: Path
) -> None:
    _, client, address = await start_server(tables=tables, default_table="plain")
    answer = await client.generate([7] * 5, max_new_tokens=3, ignore_eos=True)
    assert (answer.started.budget, answer.started.min_budget) == (8, 16)
    assert answer.finished.cache.evicted_tokens == 0
    # A fifth of 60 tokens would be 12.
    answer = await client.generate([7] * 40, max_new_tokens=20, ignore_eos=True)
    assert (answer.started.budget, answer.started.min_budget) == (16, 16)
    answer = await client.generate([7] * 80, max_new_tokens=20, ignore_eos=True)
    assert (answer.started.budget, answer.started.min_budget) == (20, None)
    options = ["--max-new-tokens", "3", "--ignore-eos", "--target", address]
    code, out, _ = await run("Hello", *options)
    assert code == 0
    assert "; table plain, 4 tokens recent, budget 8 tokens, raised by min_budget 16; " in out


@pytest.mark.parametrize(
    ("table", "requested_policy", "budget", "floor"),
    [
        ("plain", {}, 30, 30),
        ("forty", {}, 40, 40),
        ("none", {}, 20, None),
        ("forty", {"min_budget": 50}, 50, 50),
        ("forty", {"min_budget": 0}, 20, None),
        ("forty", {"budget": 21}, 21, None),
        (None, {"alpha": 0.5, "budget_ratio": 0.1}, 30, 30),
        (None, {"preset": "h2o", "budget_ratio": 0.1, "min_budget": 11}, 11, 11),
        (None, {"preset": "h2o", "budget": 11}, 11, None),
    ],
)
async def test_min_budget_comes_from_the_request_then_the_table_then_the_server(
    start_server: StartServer,
    tables: Path,
    table: str | None,
    requested_policy: dict[str, float],
    budget: int,
    floor: int | None,
) -> None:
    _, client, _ = await start_server(tables=tables, min_budget=30)
    policy = CachePolicy(table=table, **requested_policy)
    answer = await client.generate([7] * 80, max_new_tokens=20, cache_policy=policy)
    assert (answer.started.budget, answer.started.min_budget) == (budget, floor)


async def test_the_served_policies_include_min_budget(
    start_server: StartServer, tables: Path
) -> None:
    _, client, address = await start_server(tables=tables, default_table="forty")
    assert (await client.get_model()).default_cache_policy == CachePolicy(
        table="forty",
        **{"budget_ratio": 0.2, "min_budget": 40, "recent": 4, "sinks": 2, "prefill_chunk": 0},
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.ModelServiceStub(channel)
        expected = {
            name: (await stub.GetAlphaTable(pb.GetAlphaTableRequest(name=name))).table
            for name in ("plain", "forty", "none")
        }
    assert not expected["plain"].HasField("min_budget")
    assert expected["none"].HasField("min_budget")
    assert [expected[name].min_budget for name in ("forty", "none")] == [40, 0]
    assert (await client.get_alpha_table("forty")).policy.min_budget == 40
    _, client, _ = await start_server(tables=tables, default_table="plain")
    assert (await client.get_model()).default_cache_policy.min_budget == 16


async def test_a_ratio_that_leaves_no_room_is_refused_by_its_field(
    start_server: StartServer,
) -> None:
    _, client, _ = await start_server()
    policy = CachePolicy(alpha=0.5, budget_ratio=0.05, min_budget=0, sinks=9)
    with pytest.raises(
        InvalidArgument,
        match=r"^input\.cache_policy\.budget_ratio: budget_ratio 0\.05 of 100 tokens is 5 tokens, ",
    ):
        await client.generate([7] * 80, max_new_tokens=20, cache_policy=policy)


async def test_min_budget_out_of_range_is_refused_by_its_field(start_server: StartServer) -> None:
    _, client, address = await start_server()
    requested_policy = CachePolicy(alpha=0.5, budget_ratio=0.2, min_budget=65)
    with pytest.raises(InvalidArgument, match=r"^input\.cache_policy\.min_budget: min_budget 65 "):
        await client.generate([7] * 80, max_new_tokens=20, cache_policy=requested_policy)
    code, _, err = await run("x", "--target", address, "--min-budget", "-1")
    assert code == 2
    assert "input.cache_policy.min_budget: " in err


async def test_a_misspelt_preset_is_refused_by_its_field(
    start_server: StartServer,
) -> None:
    _, client, _ = await start_server()
    with pytest.raises(InvalidRequest, match="did you mean h2o") as caught:
        await client.generate("x", max_new_tokens=1, cache_policy=CachePolicy(preset="h20"))  # type: ignore[arg-type]
    assert caught.value.violations[0][0] == "preset"


def test_min_budget_defaults_to_a_quarter_of_a_small_row_or_its_narrowest_head() -> None:
    options = ServerOptions(slots=1024)
    assert options.min_budget_for(None) == MIN_BUDGET
    assert ServerOptions(slots=100).min_budget_for(None) == 25
    # The narrowest of these heads has half of the mean, and of those a tenth.
    row = slots_per_head(100, SHARES, 10**6)
    assert ServerOptions(slots=100).min_budget_for(row) == 25
    assert ServerOptions(slots=100).min_budget_for(((190, 10),)) == 10
    assert ServerOptions(slots=100, min_budget=0).min_budget_for(row) == 0
    assert options.engine_config(None).default_policy.min_budget == MIN_BUDGET


def test_min_budget_above_the_slots_of_a_row_fails_the_start() -> None:
    with pytest.raises(InvalidArgument, match=r"^--min-budget: 65; accepted: 0 \(none\) to 64"):
        ServerOptions(slots=64, min_budget=65).engine_config(None)


Ratio = Callable[[int | None], AlphaTable]


@pytest.fixture
def ratio(identity: ModelIdentity) -> Ratio:
    """A table that deals a fifth of a request unequally, by its own floor."""

    def make(floor: int | None) -> AlphaTable:
        shape = {"head_share": SHARES, "budget": None, "budget_ratio": 0.2, "recent": 0, "sinks": 0}
        return make_table(identity, name="ratio", min_budget=floor, **shape)

    return make


@pytest.mark.parametrize(
    ("options", "own", "says"),
    [
        ({"min_budget": 31}, None, "--min-budget is 31 .*--slots 62 .*, or --min-budget 30 or"),
        ({}, 31, "min_budget of ratio is 31 tokens.*give --slots 62 or more$"),
    ],
)
async def test_min_budget_above_the_narrowest_head_fails_the_start(
    start_server: StartServer,
    tmp_path: Path,
    ratio: Ratio,
    options: dict[str, int],
    own: int | None,
    says: str,
) -> None:
    folder = tmp_path / "shaped"
    folder.mkdir()
    save_table(ratio(own), folder / "ratio.json")
    settings = {"tables": folder, "default_table": "ratio", "slots": 60, "default_budget": 8}
    with pytest.raises(InvalidArgument, match=says):
        await start_server(**settings, **options)
    settings |= {"slots": 62}
    _, client, _ = await start_server(**settings, **options)
    for prompt in (1, 27, 28, 29, 30, 31, 40, 60, 90, 118, 140, 150, 160, 290):
        answer = await client.generate([7] * prompt, max_new_tokens=2, ignore_eos=True)
        wanted = max(int((prompt + 2) * 0.2 + 0.5), min(31, prompt + 2))
        assert sum(map(sum, answer.started.head_budgets)) == wanted * 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"min_budget": 31},
            "--min-budget is 31 .*--slots 62 or more, or --min-budget 30 or",
        ),
        (
            {"min_budget": 31, "default_budget": 40},
            "--default-budget is 40 tokens and --min-budget is 31 tokens, .*give --slots 80 or "
            "more, or --default-budget 30 or less and --min-budget 30 or less$",
        ),
    ],
)
async def test_server_budgets_must_fit_the_rows_of_a_default_table_with_a_fixed_budget(
    start_server: StartServer,
    tmp_path: Path,
    identity: ModelIdentity,
    options: dict[str, int],
    says: str,
) -> None:
    folder = tmp_path / "shaped"
    folder.mkdir()
    fixed = make_table(identity, name="fixed", head_share=SHARES, budget=20, recent=0, sinks=0)
    save_table(fixed, folder / "fixed.json")
    settings = {"tables": folder, "default_table": "fixed", "slots": 60, "default_budget": 8}
    with pytest.raises(InvalidArgument, match=says):
        await start_server(**settings | options)
    _, client, _ = await start_server(**settings, min_budget=30)
    policy = CachePolicy(budget_ratio=0.1)
    for prompt in (1, 27, 28, 29, 100):
        answer = await client.generate([7] * prompt, max_new_tokens=2, cache_policy=policy)
        assert answer.started.budget == min(30, prompt + 2)


def test_min_budget_of_a_table_with_a_fixed_budget_must_fit(identity: ModelIdentity) -> None:
    options, rows = ServerOptions(slots=60, default_budget=8), slots_per_head(60, SHARES, 10**6)

    def fixed(floor: int) -> AlphaTable:
        shape = {"head_share": SHARES, "budget": 20, "recent": 0, "sinks": 0}
        return make_table(identity, name="fixed", min_budget=floor, **shape)

    check_default(options, rows, 10**6, fixed(30))
    with pytest.raises(TableInvalid, match=r"its min_budget of 31 tokens, .*--slots 62 or more$"):
        check_default(options, rows, 10**6, fixed(31))


def test_a_table_whose_min_budget_does_not_fit_cannot_be_the_default(ratio: Ratio) -> None:
    options = ServerOptions(slots=60, default_budget=8)
    rows = slots_per_head(60, SHARES, 10**6)
    check_default(options, rows, 10**6, ratio(30))
    check_default(options, rows, 10**6, ratio(None))
    with pytest.raises(
        TableInvalid, match=r"never below 31 tokens .*has 30; start .* and --slots 62 or more$"
    ):
        check_default(options, rows, 10**6, ratio(31))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (
            CachePolicy(alpha=0.95, recent_share=0.25, budget=1024, min_budget=64),
            "a2sf, alpha 0.95, 0.25 of the rest recent, budget 1024 tokens",
        ),
        (
            CachePolicy(table="mathqa", recent=8, budget_ratio=0.2, min_budget=64),
            "table mathqa, 8 tokens recent, budget 0.2 of prompt + new tokens, at least 64",
        ),
        (
            CachePolicy(table="mathqa", recent=8, budget_ratio=0.2, min_budget=0),
            "table mathqa, 8 tokens recent, budget 0.2 of prompt + new tokens",
        ),
        (CachePolicy(preset="h2o", budget=32), "h2o, budget 32 tokens"),
    ],
)
def test_a_policy_is_described_in_one_line(policy: CachePolicy, words: str) -> None:
    assert describe_policy(policy) == words


def test_help_and_pages_give_the_defaults() -> None:
    described = {
        name: field.description or "" for name, field in ServerOptions.model_fields.items()
    }
    root = Path(__file__).resolve().parents[3]
    pages = [(root / "docs" / name).read_text() for name in ("operations.md", "clients.md")]
    method = DEFAULT_METHOD
    assert f"alpha {method.alpha:g} in all heads" in " ".join(described["default_table"].split())
    assert f"a share of {method.recent_share:g}" in " ".join(described["default_table"].split())
    assert f"without it {MIN_BUDGET}, a quarter" in " ".join(described["min_budget"].split())
    for page in pages:
        assert f"factor {method.alpha:g} " in page
        assert f"a share of {method.recent_share:g}" in page
        assert f"{MIN_BUDGET} tokens" in page
    assert f"alpha {method.alpha:g}".replace("0.", ".") in (root / "README.md").read_text()
