"""The GPU command where there is no GPU: its order, its deadlines, its refusals, and dry parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import RESULTS
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import alone, decode, peers, walk
from benchmarks.gpu.__main__ import FIRST, PARTS, Part, carry_out, main
from benchmarks.gpu.models import plain, token_bytes
from benchmarks.gpu.report import CheckFailed, Deadline, NotSupported, OutOfTime, Report
from benchmarks.gpu.run import DRY, Cell, Run
from benchmarks.gpu.timing import figures, spread

HEAD = {"date": "2026-01-01", "command": "c", "settings": {}}
PROCESSES = ("compiled", "server")
"""Parts that start processes of their own."""


def dry_run(path: Path | None = None, seconds: float = 100.0) -> Run:
    return Run(
        torch.device("cpu"),
        Report(path, HEAD),
        dry=True,
        deadline=Deadline(0.0, lambda: -seconds),
        sizes=DRY,
    )


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def through(part: Part) -> list[dict[str, Any]]:
    """A part's entries, gone through on the processor."""
    run = dry_run()
    with run.report.part(part.name) as about:
        part.do(run)
    assert about["status"] == "measured", about
    entries: list[dict[str, Any]] = run.report.document["entries"]
    assert entries
    assert [e for e in entries if e["status"] != "measured"] == []
    return entries


@pytest.mark.parametrize(
    "part",
    [part for part in (FIRST[0], *PARTS) if part.name not in (*PROCESSES, "kvpress")],
    ids=lambda part: part.name,
)
def test_every_line_of_a_part_runs_without_a_gpu(part: Part) -> None:
    through(part)


@pytest.mark.slow
@pytest.mark.parametrize("part", [p for p in PARTS if p.name in PROCESSES], ids=lambda p: p.name)
def test_parts_with_processes_of_their_own_run_without_a_gpu(part: Part) -> None:
    through(part)


def test_texts_get_the_same_in_one_launch_as_by_one_a_token() -> None:
    one, many = walk.both(dry_run().model("8b"), DRY.texts[0])
    found = one()
    assert found.abs().amax(dim=-1).min() > 0
    torch.testing.assert_close(found, many())
    # From slots that hold another walk's tokens as from empty ones.
    torch.testing.assert_close(found, one())


def test_a_cell_tells_ratios_prices_and_shares_of_the_roofline() -> None:
    run = dry_run()
    run.bytes_per_s = 1e9
    decode.run_cells(run, (DRY.cells[0],))
    entries = {entry["variant"]: entry for entry in run.report.document["entries"]}
    assert set(entries) == {"a2sf", "table", "window", "full", "dynamic", "batching"}
    assert entries["dynamic"]["times_faster_than_transformers"] == 1.0
    ours = entries["a2sf"]
    ratio = entries["dynamic"]["ms_per_step"] / ours["ms_per_step"]
    assert ours["times_faster_than_transformers"] == pytest.approx(ratio, abs=1e-3)
    assert ours["roofline_ms"] == pytest.approx(ours["step_bytes"] / 1e6, abs=1e-4)
    assert "price_of_scoring" in ours
    assert "price_of_scoring" not in entries["window"]
    assert entries["full"]["step_bytes"] > ours["step_bytes"]
    assert all(entry["turns"] == DRY.rounds for entry in entries.values())


def test_a_variant_that_fails_ends_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full_up(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for 34 GB")

    monkeypatch.setattr(decode, "Dynamic", full_up)
    run = dry_run()
    decode.run_cells(run, (Cell("8b", 40, 2, 16),))
    entries = {entry["variant"]: entry for entry in run.report.document["entries"]}
    assert entries["dynamic"]["status"] == "failed"
    assert entries["dynamic"]["reason"] == "OutOfMemoryError: no room for 34 GB"
    assert entries["a2sf"]["status"] == "measured"
    assert "times_faster_than_transformers" not in entries["a2sf"]


def test_rows_of_continuous_batching_outlive_the_filling_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "READ_AT_ONCE", 64)
    model = dry_run().model("8b")
    rows = peers.Batching(plain(model), 6, context=60, room=9)
    lengths = [state.generated_len() for state in rows._states]
    assert min(lengths) < max(lengths)
    for _ in range(9):
        rows.step()
    rows.close()


def test_a_growing_cache_holds_a_token_more_after_each_step() -> None:
    model = dry_run().model("8b")
    rows = peers.Dynamic(plain(model), 3, 20)
    assert rows.kv_bytes == 3 * 20 * token_bytes(model)
    rows.step()
    assert rows.kv_bytes == 3 * 21 * token_bytes(model)


def test_cells_that_the_time_does_not_reach_are_named() -> None:
    run = dry_run(seconds=decode.CELL_S - 1)
    decode.run_cells(run, DRY.cells)
    entries = run.report.document["entries"]
    assert [(e["name"], e["status"]) for e in entries] == [(c.name, "skipped") for c in DRY.cells]


def test_rows_that_do_not_fit_are_tried_with_an_eighth_less() -> None:
    tried = []

    def attempt(rows: int) -> list[float]:
        tried.append(rows)
        if rows > 5:
            raise torch.OutOfMemoryError
        return [1.0]

    run = dry_run()
    run.sizes = DRY.__class__(ceiling=8)
    assert alone._most(run, 1, attempt) == (5, [1.0])
    assert tried == [8, 7, 6, 5]
    with pytest.raises(MemoryError, match="not one row"):
        alone._most(run, 1, lambda rows: attempt(99))


def part(name: str, do: Callable[[Run], None]) -> Part:
    return Part(name, 1, do)


def passed(run: Run) -> None:
    run.report.document["checks"] = "passed"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run], None]], None]:
    def replaced(do: Callable[[Run], None]) -> None:
        monkeypatch.setattr(command, "FIRST", (part("checks", do),))

    replaced(passed)
    return replaced


@pytest.mark.usefixtures("checks")
def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    written = []

    def broken(run: Run) -> None:
        run.report.add("first", ms=1.0)
        raise ImportError("No module named 'grpc'")

    def absent(run: Run) -> None:
        written.append(json.loads(out.read_text()))
        raise NotSupported("not here")

    parts = [part("broken", broken), part("absent", absent), part("well", lambda run: None)]
    assert carry_out(dry_run(out), parts, 60)
    document = json.loads(out.read_text())
    assert [(p["name"], p["status"], p.get("reason")) for p in document["parts"]] == [
        ("checks", "measured", None),
        ("broken", "failed", "ImportError: No module named 'grpc'"),
        ("absent", "not supported", "not here"),
        ("well", "measured", None),
    ]
    assert document["entries"] == [
        {"part": "broken", "name": "first", "status": "measured", "ms": 1.0}
    ]
    # What a part measured was on disk when the next one began.
    assert written[0]["parts"][1]["name"] == "broken"
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.usefixtures("checks")
def test_a_run_that_is_ended_keeps_its_results(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"

    def ended(run: Run) -> None:
        run.report.add("first", ms=1.0)
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        carry_out(dry_run(out), [part("long", ended)], 60)
    document = json.loads(out.read_text())
    assert document["entries"][0]["name"] == "first"
    assert document["parts"][-1]["reason"] == "ended from outside"


def test_nothing_is_timed_where_a_check_fails(
    checks: Callable[[Callable[[Run], None]], None],
) -> None:
    def failing(run: Run) -> None:
        run.report.document["checks"] = "failed"
        raise CheckFailed("1 of 6 checks failed")

    checks(failing)
    timed: list[Run] = []
    run = dry_run()
    assert not carry_out(run, [part("decode", timed.append)], 60)
    assert not timed
    last = run.report.document["parts"][-1]
    assert (last["status"], last["reason"]) == ("skipped", "the checks failed")


@pytest.mark.usefixtures("checks")
def test_parts_share_the_remaining_time() -> None:
    given = []
    run = dry_run()
    parts = [part(name, lambda run: given.append(run.deadline.left)) for name in "abc"]
    carry_out(run, parts, 300 + command.LAST_S)
    # Of 300 seconds a quarter for the checks, which take none of it.
    assert [round(seconds, -1) for seconds in given] == [100, 150, 300]
    given.clear()
    run = dry_run()
    assert not carry_out(run, parts, 0)
    assert not given
    assert {p["reason"] for p in run.report.document["parts"]} == {"the time is up"}


def test_a_deadline_is_a_moment() -> None:
    now = [10.0]
    deadline = Deadline(30.0, lambda: now[0])
    assert deadline.left == 20
    assert deadline.within(5).at == 15
    assert deadline.within(50).at == 30
    deadline.check(20)
    with pytest.raises(OutOfTime, match="20 s left"):
        deadline.check(21)
    now[0] = 31
    with pytest.raises(OutOfTime):
        deadline.check()


def test_a_machine_without_cuda_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke()
    assert result.exit_code == 2
    assert result.output == "benchmarks.gpu needs a CUDA device, and torch finds none here.\n"


def test_a_part_that_there_is_not_is_refused_by_name() -> None:
    result = invoke("--dry", "--only", "decoding")
    assert result.exit_code == 2
    assert "no such part: decoding" in result.output


def test_a_dry_run_says_so_and_writes_nothing(
    checks: Callable[[Callable[[Run], None]], None],
) -> None:
    before = sorted(RESULTS.iterdir())
    result = invoke("--dry", "--only", "attention")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1] == "dry run: no figure: attention: measured"
    assert all(line.startswith("dry run: no figure") for line in lines)
    assert sorted(RESULTS.iterdir()) == before


def test_figures_tell_medians_quartiles_and_the_99th() -> None:
    found = figures([[1.0, 3.0], [2.0, 4.0], [4.0, 4.0]], 8)
    assert found["ms_per_step"] == 3.0
    assert found["ms_per_step_quartiles"] == [2.5, 3.5]
    assert found["ms_single_step_p99"] == 4.0
    assert found["tokens_per_s"] == 2666.67
    assert figures([[float(n) for n in range(1, 201)]], 1)["ms_single_step_p99"] == 198.0
    assert spread([1.0, 2.0, 3.0]) == {"median": 2.0, "quartiles": [1.5, 2.5]}
    assert decode.price([[2.0, 2.0], [3.0]], [[1.0, 1.0], [2.0]])["median"] == 0.75
