"""torch uses the processors of the container's quota, not all of the machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from a2sf import threads


@pytest.mark.parametrize(
    ("text", "count"),
    [("max 100000\n", None), ("200000 100000\n", 2), ("150000 100000\n", 2), ("500 100000", 1)],
)
def test_a_quota_is_read_in_whole_processors(text: str, count: int | None, tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text(text)
    assert threads.granted(limit) == count


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    assert threads.granted(tmp_path / "absent") is None


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored")
def test_the_quota_limits_torch_s_default_and_an_explicit_count_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text("100000 100000")
    monkeypatch.setattr(threads, "CGROUP_LIMIT", limit)
    torch.set_num_threads(4)
    assert threads.set_threads(3) == torch.get_num_threads() == 3
    assert threads.set_threads() == torch.get_num_threads() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="torch's wheel brings libgomp on Linux alone")
@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "'0'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "'30000000000'"),
        ({"GOMP_SPINCOUNT": "77"}, "'77'"),
    ],
)
def test_threads_sleep_while_waiting_unless_the_environment_says_otherwise(
    given: dict[str, str], spins: str
) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    output = subprocess.run(
        [sys.executable, "-c", "from a2sf.threads import *; wait_passively(); import torch"],
        env={**kept, "OMP_DISPLAY_ENV": "verbose", **given},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    ).stderr
    assert f"GOMP_SPINCOUNT = {spins}" in output
