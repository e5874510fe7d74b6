"""The checks before the timing: they pass on what is right, and fail on what is not."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which the extra gpu brings")

from a2sf.cache.kernels import (
    decode,
    decode_programs,
    prefill,
    prefill_programs,
    score_update,
    triton_walk,
    triton_walk_programs,
)
from a2sf.engine import decoding
from benchmarks.gpu import ahead, checks, walk
from benchmarks.gpu.models import DRY_SHAPES
from benchmarks.gpu.report import CheckFailed, Deadline, NotSupported, OutOfTime
from benchmarks.gpu.run import DRY, Cell, Run
from tests import kernel_cases, triton_walk_cases
from tests.benchmarks.test_gpu import dry_run
from tests.interpreting import interpreting

CUDA = torch.cuda.is_available()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Small tiles, so that the interpreter has less to do.
    monkeypatch.setattr(prefill, "QUERIES", 16)
    with interpreting(score_update, decode_programs, prefill_programs, triton_walk_programs):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "check",
    [
        checks.decode_steps,
        checks.decode_chain,
        checks.walks,
        checks.prompt_masses,
        checks.engine_kernels,
    ],
)
def test_a_check_passes_by_the_interpreter(check: object) -> None:
    assert callable(check)
    assert check(dry_run())


@pytest.mark.usefixtures("interpreted")
def test_a_kernel_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode.decode_attention

    def off(*tokens: torch.Tensor, **arguments: object) -> torch.Tensor:
        return right(*tokens, **arguments) * 1.05

    monkeypatch.setattr(kernel_cases.decode, "decode_attention", off)
    run = dry_run()
    with pytest.raises(AssertionError, match="not close"):
        checks.decode_steps(run)
    with pytest.raises(AssertionError, match="not close"):
        checks.decode_chain(run)


@pytest.mark.usefixtures("interpreted")
def test_a_walk_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_walk.walk

    def off(*tokens: torch.Tensor, output: torch.Tensor, **arguments: object) -> None:
        right(*tokens, output=output, **arguments)
        output *= 1.05

    monkeypatch.setattr(triton_walk_cases.triton_walk, "walk", off)
    with pytest.raises(AssertionError, match="not close"):
        checks.walks(dry_run())


@pytest.mark.usefixtures("interpreted")
def test_texts_get_the_same_from_the_walk_as_from_the_decode_kernel() -> None:
    model = dry_run().model("8b")
    assert decoding.choose_kernels("auto", model) == "triton"
    one, many = walk.both(model, DRY.texts[0])
    torch.testing.assert_close(one(), many())


@pytest.mark.skipif(CUDA, reason="what a machine without a GPU is told")
def test_parts_that_need_a_gpu_are_not_supported_without_one() -> None:
    for check in (checks.flash_attention, checks.engine_graphs, checks.decode_steps):
        with pytest.raises(NotSupported):
            check(dry_run())


@pytest.mark.usefixtures("interpreted")
def test_the_programs_of_the_graphs_are_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    # By an H100 of 132 multiprocessors and tiles of 64 slots (128 with heads of 64).
    cells = (Cell("8b", 4096, 8, 1024), Cell("8b", 4096, 1, 512, ("full",)), Cell("1b", 9, 1, 512))
    assert ahead.needed(cells, 132, room=64) == [(64, 4), (128, 4), (128, 8), (128, 16), (128, 22)]
    launched = []
    right = decode_programs.attend

    class Counting:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            launched.append(grid)
            return right[grid]

    monkeypatch.setattr(decode_programs, "attend", Counting())
    ahead.compile_for(DRY_SHAPES["8b"], 3, torch.device("cpu"), torch.float32)
    assert launched == [(2, 3)] * 2
    with ahead.compiling(dry_run()):
        pass


def names(run: Run) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in run.report.document["entries"]}


CHECKS = (
    "decode_steps",
    "decode_chain",
    "walks",
    "prompt_masses",
    "flash_attention",
    "engine_kernels",
    "engine_graphs",
)


@pytest.fixture
def all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHECKS:
        check = lambda run: "all of it"  # noqa: E731
        check.__doc__ = name
        monkeypatch.setattr(checks, name, check)


@pytest.mark.usefixtures("all_pass")
def test_all_checks_are_carried_out_whichever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run = dry_run()
    checks.run_checks(run)
    assert run.report.document["checks"] == "passed"
    assert names(run) == dict.fromkeys(CHECKS, "passed")

    def fails(run: Run) -> str:
        """decode_steps"""
        raise AssertionError("other slots")

    monkeypatch.setattr(checks, "decode_steps", fails)
    run = dry_run()
    with pytest.raises(CheckFailed, match="1 of 7 checks failed: decode_steps"):
        checks.run_checks(run)
    assert run.report.document["checks"] == "failed"
    assert names(run) == dict.fromkeys(CHECKS, "passed") | {"decode_steps": "failed"}


@pytest.mark.usefixtures("all_pass")
def test_a_check_without_time_leaves_them_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(run: Run) -> str:
        """engine_kernels"""
        run.deadline.check()
        return ""

    monkeypatch.setattr(checks, "engine_kernels", slow)
    run = dry_run()
    run.deadline = Deadline(0.0, lambda: 1.0)
    checks.run_checks(run)
    assert run.report.document["checks"] == "incomplete"
    with pytest.raises(OutOfTime):
        slow(run)
