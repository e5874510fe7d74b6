"""The server's command line: a failed start prints one line and exits with 2."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from a2sf.engine.engine import Engine
from service.__main__ import main

pytestmark = pytest.mark.usefixtures("as_it_was")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "/no/such/tables"], "error: --tables: /no/such/tables: no such directory"),
        (
            ["--default-table", "mathqa"],
            "error: --default-table: no alpha table 'mathqa'; ",
        ),
        (["--model", "/no/such/model"], "error: --model: "),
        (["--max-bacth", "2"], "unrecognized arguments: --max-bacth 2; did you mean --max-batch?"),
        (["--default-budget", "65"], "accepted: 5 (sinks and the newest token) to 64 (slots)"),
        (["--default-budget", "4"], "accepted: 5"),
        (["--min-budget", "65"], "--min-budget: 65; accepted: 0 (none) to 64 (slots)"),
        (
            ["--device", "abacus"],
            "error: --device: 'abacus'; accepted: auto, cpu, cuda, cuda:0 and so on",
        ),
        (["--dtype", "float3"], "error: --dtype: 'float3'; accepted: auto"),
        (["--port-file", "/no/such/folder/port"], "/no/such/folder: no such directory"),
        (["--max-batch", "1000000000000"], "do not fit into memory; lower --max-batch"),
        (["--host", "192.0.2.1"], "--insecure-bind"),
        (["--host", "192.0.2.1", "--insecure-bind"], "Cannot assign requested address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_failed_start_gives_the_reason(
    long_model_dir: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("--model", str(long_model_dir), "--port", "0", "--device", "cpu"),
                *("--slots", "64", "--default-budget", "32", *arguments),
            ]
        )
    assert ended.value.code == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


def test_an_engine_crash_in_the_first_step_exits_1(
    long_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Engine) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Engine, "step", broken)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", str(long_model_dir), "--port", "0"])
    assert ended.value.code == 1
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line == "error: the engine's thread died"


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Undo what the command line makes of this process's logging."""
    before = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = before
    logging.captureWarnings(False)
    structlog.reset_defaults()
