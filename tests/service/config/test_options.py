"""Settings: flags override the environment, the environment the file, the file the defaults."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from a2sf.errors import InvalidArgument
from service.__main__ import main
from service.config import settings
from service.config.groups import GROUPS
from service.config.options import ServerOptions
from service.config.settings import NAMES, flag, load, variable


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("A2SF_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text("max_batch = 2\nslots = 100\ngrace = 1.5\ntables = '/file'\n")
    return path


@pytest.fixture
def help_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_flags_override_the_environment_which_overrides_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A2SF_MAX_BATCH", "3")
    monkeypatch.setenv("A2SF_SLOTS", "200")
    loaded = load(["--config", str(file), "--max-batch", "4"])
    options = loaded.options
    assert (options.max_batch, options.slots, options.grace_s) == (4, 200, 1.5)
    assert options.tables == Path("/file")
    assert options.step_tokens == ServerOptions().step_tokens
    assert loaded.sources == {
        **{"max_batch": "--max-batch", "slots": "A2SF_SLOTS"},
        **{"grace": str(file), "tables": str(file)},
    }


def test_the_environment_names_a_file_and_a_flag_overrides_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A2SF_CONFIG", str(file))
    assert load([]).options.max_batch == 2
    other = tmp_path / "other.toml"
    other.write_text("max_batch = 7\n")
    assert load(["--config", str(other)]).options.max_batch == 7


def test_none_restores_the_default_and_an_empty_variable_is_ignored(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(["--config", str(file), "--tables", "none"]).options.tables is None
    monkeypatch.setenv("A2SF_TABLES", "")
    assert load(["--config", str(file)]).options.tables == Path("/file")
    monkeypatch.setenv("A2SF_TABLES", "none")
    assert load(["--config", str(file)]).options.tables is None
    # So it does for a setting that always has a value.
    assert load(["--config", str(file), "--max-batch", "none"]).options.max_batch == 8
    monkeypatch.setenv("A2SF_MAX_BATCH", "none")
    assert load(["--config", str(file)]).options.max_batch == 8


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert load(["--port", "1", "--port", "2"]).options.port == 2


def test_options_created_in_code_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A2SF_MAX_BATCH", "3")
    monkeypatch.setattr("sys.argv", ["a2sf-serve", "--max-batch", "4"])
    assert ServerOptions().max_batch == 8
    assert ServerOptions(grace_s=2.0).grace_s == 2.0
    with pytest.raises(ValidationError):
        ServerOptions(max_batch="4")  # type: ignore[arg-type]


EVERYTHING: dict[str, Any] = {
    **{"model": 'a "quoted" \\ näme', "revision": "main", "device": "cpu", "dtype": "float32"},
    **{"kernels": "torch", "cuda_graphs": False, "chat_template": "brief"},
    **{"threads": 2, "tables": Path("/tä bles"), "default_table": "mathqa"},
    **{"watch_tables": False, "max_batch": 3, "slots": 99, "default_budget": 44},
    **{"min_budget": 8},
    **{"max_prefill_tokens": 77, "step_tokens": 9, "max_waiting": 0, "max_message_bytes": 5},
    **{"max_prompt_bytes": 6, "max_unread": 7, "stall_timeout": 0.25, "host": "::1", "port": 0},
    **{"port_file": Path("/p"), "insecure_bind": True, "token_file": Path("/t")},
    **{"tls_cert": Path("/c"), "tls_key": Path("/k"), "tls_client_ca": Path("/a")},
    **{"admin_port": 0, "admin_host": "::1", "admin_token_file": Path("/at")},
    **{"settle": 1.25, "grace": 3.5, "log_level": "debug", "log_format": "json"},
    **{"log_prompts": True, "metrics_port": 1, "metrics_host": "::1", "traces": True},
}
"""A value that is no default for every setting."""


def as_flags(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, bool):
            yield flag(name) if value else flag(name).replace("--", "--no-", 1)
        else:
            yield f"{flag(name)}={value}"


def settings_of(options: ServerOptions) -> dict[str, Any]:
    return {name: getattr(options, field) for field, name in NAMES.items()}


@pytest.mark.parametrize("place", ["flags", "environment", "file"])
def test_every_setting_can_come_from_every_source(
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert set(EVERYTHING) == set(NAMES.values())
    assert all(value != settings_of(ServerOptions())[name] for name, value in EVERYTHING.items())
    arguments: list[str] = []
    if place == "flags":
        arguments = list(as_flags(EVERYTHING))
    elif place == "environment":
        for name, value in EVERYTHING.items():
            monkeypatch.setenv(variable(name), str(value))
    else:
        # What --print-config printed for the same settings is a file again.
        with pytest.raises(SystemExit) as ended:
            main([*as_flags(EVERYTHING), "--print-config"])
        assert ended.value.code == 0
        printed = tmp_path / "printed.toml"
        printed.write_text(capsys.readouterr().out)
        arguments = ["--config", str(printed)]
    assert settings_of(load(arguments).options) == EVERYTHING


def test_the_printed_configuration_names_the_source_of_each_value(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A2SF_PORT", "7")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--config", str(file), "--no-watch-tables", "--print-config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "watch_tables = false  # --watch-tables" in lines
    assert "port = 7  # A2SF_PORT" in lines
    assert f"max_batch = 2  # {file}" in lines
    assert "max_waiting = 64  # default" in lines
    assert "# admin_port is not set" in lines
    assert tomllib.loads(printed)["grace"] == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port: 70000; accepted: a whole number from 0 to 65535"),
        (["--max-batch", "0"], "--max-batch: 0; accepted: a whole number, 1 or more"),
        (["--max-batch", "many"], "--max-batch: 'many'; accepted: a whole number, 1 or more"),
        (["--grace", "-1"], "--grace: -1.0; accepted: a finite number, 0 or more"),
        (["--grace", "inf"], "--grace: inf; accepted: a finite number, 0 or more"),
        (["--log-level", "loud"], "--log-level: 'loud'; accepted: debug, info, warning, error"),
        (["--max-bathc", "1"], "unrecognized arguments: --max-bathc 1"),
        (["--grace-s", "1"], "unrecognized arguments: --grace-s 1"),
        (["--max-b", "1"], "unrecognized arguments: --max-b 1"),
        (["sevre"], "unrecognized arguments: sevre"),
        (["--port"], "argument --port: expected one argument"),
        (["--admin-port", "0"], "--admin-port: needs --admin-token-file"),
        (["--admin-token-file", "t"], "--admin-token-file: needs --admin-port"),
        (["--tls-cert", "c"], "--tls-cert: needs --tls-key, and --tls-key needs it"),
        (["--tls-key", "k"], "--tls-cert: needs --tls-key, and --tls-key needs it"),
        (["--tls-client-ca", "c"], "--tls-client-ca: needs --tls-cert"),
        (["--config", "/no/such.toml"], "--config: /no/such.toml: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_invalid_flag_gets_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bathc = 1", "unknown setting 'max_bathc'; did you mean max_batch?"),
        ("grace_s = 1.0", "unknown setting 'grace_s'; did you mean grace?"),
        ("[server]\nport = 1", "unknown setting 'server'"),
        ("port = [", "is not TOML: "),
        ("port = '\udc80'", "is not TOML: "),
        ("port = [1]", "--port: [1] (from "),
        ("port = 70000", "--port: 70000 (from "),
    ],
)
def test_an_invalid_file_is_reported_with_its_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidArgument, match=re.escape(message)) as caught:
        load(["--config", str(path)])
    assert str(path) in str(caught.value)


def test_an_invalid_variable_is_reported_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A2SF_PORT", "tcp://10.0.0.7:50051")
    with pytest.raises(InvalidArgument, match=r"--port: 'tcp://.*' \(from A2SF_PORT\)"):
        load([])
    # A flag goes before it, so that it does no harm.
    assert load(["--port", "1"]).options.port == 1


def test_only_variables_that_nearly_match_a_setting_cause_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A2SF_DATA_DIR", "/data")
    monkeypatch.setenv("A2SF_DATA", "/data")
    monkeypatch.setenv("A2SF_PORT_50051_TCP_PROTO", "tcp")
    assert load([]).misspelt == ()
    monkeypatch.setenv("A2SF_MAX_BATHC", "3")
    assert load([]).misspelt == ("A2SF_MAX_BATHC (did you mean A2SF_MAX_BATCH?)",)


def test_the_help_is_in_sections_with_every_flag_and_its_default(help_text: str) -> None:
    lines = [" ".join(line.split()) for line in help_text.splitlines()]
    assert lines[0] == "usage: a2sf-serve [serve] [--config FILE] [OPTION ...]"
    headings = re.findall(r"^(\S.*):$", help_text, re.MULTILINE)
    assert headings == ["General", *(group.__doc__ for group in GROUPS)]
    assert "--max-batch N Requests that decode together. (default: 8)" in lines
    assert "--grace SECONDS Seconds that running requests then get to finish. (default: 30.0)" in (
        lines
    )
    assert "null" not in help_text
    assert "None" not in help_text
    assert max(map(len, help_text.splitlines())) <= 100


def test_every_setting_has_help_and_a_group(help_text: str) -> None:
    assert {name for group in GROUPS for name in settings.names_of(group).values()} == set(
        NAMES.values()
    )
    for name, info in zip(NAMES.values(), ServerOptions.model_fields.values(), strict=True):
        assert re.search(rf"^  {flag(name)}\b", help_text, re.MULTILINE), name
        assert info.description, f"{name} has no sentence"
        assert info.description.endswith("."), name


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_and_refusals_do_not_wait_for_torch() -> None:
    # In a separate process, because torch is already loaded here.
    program = "import sys, service.__main__ as m; m.settings.load(['--port', '1']); "
    program += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
