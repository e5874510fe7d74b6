"""The tuner's command line, in this process and in one of its own."""

import signal
import sys
from pathlib import Path

import pytest

from tuner.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output and the last line of standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["a2sf-tune", *map(str, arguments)])
    # main() sets it for its own process; here it would outlive the test.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    # A shell that starts a test in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    captured = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    assert "Traceback" not in captured.err
    lines = captured.err.replace("\r", "\n").strip().split("\n")
    return code, captured.out, lines[-1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "tuner", *map(str, arguments)]
