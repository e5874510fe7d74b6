"""The server's command line: starts that cannot succeed say why in one line, exit code 2."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from a2sf.engine import Engine
from service.__main__ import app
from service.options import ServerOptions


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tables", "/no/such/tables"], "/no/such/tables: no such directory"),
        (["--default-table", "mathqa"], "no alpha table 'mathqa'; served: none"),
        (["--default-budget", "65"], "accepted: 5 (sinks and the newest token) to 64 (slots)"),
        (["--default-budget", "4"], "accepted: 5"),
        (["--device", "abacus"], "accepted: auto, cpu, cuda"),
        (["--dtype", "float3"], "accepted: auto"),
        (["--port-file", "/no/such/folder/port"], "/no/such/folder: no such directory"),
        (["--max-batch", "1000000000000"], "do not fit into memory; lower --max-batch"),
        (["--host", "192.0.2.1"], "--insecure-bind"),
        (["--host", "192.0.2.1", "--insecure-bind"], "Cannot assign requested address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_start_that_cannot_succeed_says_why(
    long_model_dir: Path, arguments: list[str], told: str
) -> None:
    result = CliRunner().invoke(
        app,
        [
            *("--model", str(long_model_dir), "--port", "0", "--device", "cpu"),
            *("--slots", "64", "--default-budget", "32", *arguments),
        ],
    )
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    line = result.stderr.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: ")
    assert told in line


def test_an_engine_that_dies_in_its_first_step_is_no_fault_of_the_user_s(
    long_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Engine) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Engine, "step", broken)
    result = CliRunner().invoke(app, ["--model", str(long_model_dir), "--port", "0"])
    assert result.exit_code == 1
    assert result.stderr.rstrip("\n").splitlines()[-1] == "error: the engine's thread died"


def test_the_flags_defaults_are_the_options_own() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in ServerOptions.model_fields:
        flag = "--grace" if name == "grace_s" else f"--{name.replace('_', '-')}"
        assert flag in result.stdout, f"{name} has no flag"
