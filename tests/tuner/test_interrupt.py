"""Ctrl-C: real processes and real signals, at every point of a fit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from a2sf.tablefile import load_table
from tests.tuner.conftest import finished
from tests.tuner.crew import wait_for
from tests.tuner.paused_fit import POINTS

ROOT = Path(__file__).resolve().parents[2]
LINE = "interrupted; all measurements are kept: run the same command to continue"


@pytest.fixture
def flags(tiny_model_dir: Path, small_data: Path, tmp_path: Path) -> list[str]:
    """The flags of a fit that takes seconds."""
    return [
        *("--dataset", "sums", "--data-dir", f"{small_data}", "--model", f"{tiny_model_dir}"),
        *("--trials", "6", "--examples", "2", "--holdout", "4", "--length", "128"),
        *("--stages", "layers", "--out", f"{tmp_path / 'sums.json'}"),
    ]


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts a test in the background ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(process: subprocess.Popen[str]) -> list[str]:
    """Interrupt a process; return what it leaves on the screen, without bars that are wiped."""
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert out == ""
    assert "Traceback" not in errors
    lines = [line.rsplit("\r", 1)[-1].strip() for line in errors.splitlines()]
    return [line for line in lines if line]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_fit_prints_how_to_continue_and_loses_nothing(
    point: str, flags: list[str], tmp_path: Path
) -> None:
    note, journal = tmp_path / "note", tmp_path / "sums.journal"
    process = start("-m", "tests.tuner.paused_fit", point, f"{note}", *flags)
    try:
        wait_for(lambda: note.exists() or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()
        assert interrupt(process)[-1] == LINE
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "sums.json").exists()
    assert not list(tmp_path.glob(".sums.json*"))
    kept = finished(journal) if journal.exists() else []
    assert (len(kept) > 0) == (point not in ("loading", "the full cache"))

    began = time.monotonic()
    again = start("-m", "tuner", *flags)
    out, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors
    # The point that was interrupted is free at once, not when its lease has run out.
    assert time.monotonic() - began < 100
    measured = finished(journal)
    assert measured[: len(kept)] == kept
    assert len(set(measured)) == len(measured)
    assert load_table(tmp_path / "sums.json").search.trials == 6
    assert "Wrote " in out


def test_an_interruption_while_libraries_are_imported_is_one_line(flags: list[str]) -> None:
    process = start("-m", "tuner", *flags)

    def importing() -> bool:
        maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        return "libtorch_cpu" in maps

    try:
        wait_for(importing, 100)
        assert interrupt(process) == [LINE]
    finally:
        process.kill()
        process.communicate()


def test_a_second_interruption_ends_at_once() -> None:
    program = (
        "import signal, sys, time\n"
        "from tuner.interrupt import message_on_interrupt\n"
        "with message_on_interrupt('message'):\n"
        "    try:\n"
        "        print('ready', file=sys.stderr, flush=True)\n"
        "        signal.pause()\n"
        "    finally:\n"
        "        print('cleaning', file=sys.stderr, flush=True)\n"
        "        signal.pause()\n"
        "        time.sleep(60)\n"
    )
    process = start("-c", program)
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.communicate()
