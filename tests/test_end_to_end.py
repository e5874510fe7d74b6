"""The whole road, on real data, through every front door: fit, serve, ask, stop."""

import asyncio
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from a2sf.policy import CachePolicy
from a2sf.requests import Sampling
from a2sf.tablefile import load_table
from scripts.demo import chosen
from service.client import Client

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def serving(work: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A real server on a port of its own choice, stopped by SIGTERM."""
    port_file = work / "port"
    server = subprocess.Popen(
        [sys.executable, "-m", "service", "--port", "0", "--port-file", port_file, *flags], cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 120
        while not port_file.exists():
            assert server.poll() is None, "the server ended before it served"
            assert time.monotonic() < deadline, "the server was not ready in time"
            time.sleep(0.05)
        yield server, f"127.0.0.1:{port_file.read_text().strip()}"
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()


def test_a_table_fitted_on_mathqa_is_served_and_asked_for_by_name(
    tmp_path: Path, data_dir: Path
) -> None:
    out = tmp_path / "tables" / "T.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "tuner", "--dataset", "mathqa", "--data-dir", data_dir),
            *("--trials", "4", "--examples", "4", "--out", out),
        ],
        cwd=ROOT,
        check=True,
        timeout=400,
    )
    table = load_table(out)
    assert table.evidence.verdict in ("better", "no_better_than_uniform")
    with serving(tmp_path, "--model", "reference", "--tables", str(out.parent)) as (_, target):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "service.client", "Question: what is 3 + 4 ?"),
                *("--target", target, "--table", table.name, "--budget", "32"),
                *("--max-new-tokens", "60", "--ignore-eos", "--temperature", "0"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    figures = done.stdout.splitlines()[-1]
    kept = r"60 tokens .*kept 32 of \d+ tokens on average, evicted \d+; KV .* full cache"
    assert re.search(kept, figures)


def test_memory_is_flat_from_request_to_request(tmp_path: Path) -> None:
    async def ask(target: str, count: int) -> None:
        async with Client(target) as client:
            for index in range(count):
                done = await client.generate(
                    f"Request number {index}. " * (1 + index % 7),
                    max_new_tokens=40,
                    sampling=Sampling(temperature=1.0, seed=index),
                    cache_policy=CachePolicy(preset="h2o", budget=32),
                    ignore_eos=True,
                )
                assert done.finished.cache.evicted_tokens > 0

    with serving(tmp_path, "--model", "reference") as (server, target):
        asyncio.run(ask(target, 10))
        after_10 = psutil.Process(server.pid).memory_info().rss
        asyncio.run(ask(target, 40))
        after_50 = psutil.Process(server.pid).memory_info().rss
    assert after_50 - after_10 < 20 * 2**20


def demo(*flags: str, **environment: str) -> str:
    """The demonstration's output without a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.demo", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def rows(output: str) -> dict[str, tuple[int, int, int]]:
    """Of each cache: tokens kept, percent of the full memory, and right answers."""
    pattern = r"^(\S.*?)  +(\d+) +(\d+) +[\d.]+ [kM]B \((\d+)%\) +(\d+) of \d+ *$"
    found = re.findall(pattern, output, re.MULTILINE)
    return {name: (int(kept), int(share), int(right)) for name, kept, _, share, right in found}


def check_demo(output: str) -> None:
    assert [line[:1] for line in output.splitlines() if " of 4: " in line] == ["1", "2", "3", "4"]
    full, window, table = rows(output).values()
    # Positions and scores come on top of what a full cache elsewhere holds.
    assert 100 <= full[1] < 105
    for cache in (window, table):
        assert cache[0] < full[0] / 4
        assert cache[1] < 25
    assert full[2] >= 3
    assert table[2] > window[2]
    assert "stopped cleanly" in output


def test_the_demo_compares_three_caches_on_a_real_model(real_model_dir: Path) -> None:
    output = demo()
    check_demo(output)
    assert "SmolLM2-135M-Instruct" in output
    assert "Margaret Ashdown" in output


def test_without_the_real_model_the_demo_takes_the_packaged_one() -> None:
    check_demo(demo("--reference"))


def test_where_the_real_model_cannot_be_stored_the_demo_takes_the_packaged_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", "build")

    monkeypatch.setattr("scripts.demo.real_model", refuse)
    console = Console(file=StringIO(), record=True)
    assert chosen(console, reference=False).model == "reference"
    assert (
        "SmolLM2 is not available: [Errno 13] Permission denied: 'build'" in console.export_text()
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_ended_leaves_no_server_no_files_and_no_traceback(
    sent: signal.Signals, tmp_path: Path
) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "scripts.demo", "--reference"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert running.stdout is not None
        assert any("starting" in line for line in running.stdout)
        (server,) = psutil.Process(running.pid).children()
        running.send_signal(sent)
        output, _ = running.communicate(timeout=60)
        assert running.returncode == 128 + sent
        assert "Traceback" not in output
        assert not server.is_running()
        assert not list(tmp_path.iterdir())
    finally:
        # The server has the session of the demo.
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
