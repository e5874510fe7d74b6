"""The log is one stream of lines in one format, for every logger."""

import asyncio
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.contextvars import bound_contextvars

import a2sf.model.loader  # noqa: F401  (imports transformers, whose logger prints by itself)
from service.telemetry import logs

HOSTILE = "a\nlevel=error event=forged\r\x1b[31m\u2028end"

Lines = Callable[[], list[str]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """What was written to stderr, as lines; afterwards the process logs as it did before."""
    root = logging.root
    handlers, level = list(root.handlers), root.level
    try:
        yield lambda: capsys.readouterr().err.split("\n")[:-1]
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()


def objects(lines: Lines) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines()]


def test_a_json_line_starts_with_time_level_logger_and_event(lines: Lines) -> None:
    logs.configure("json", "info")
    structlog.get_logger("service.test").info("answered", outcome="OK", path=Path("/x"))
    (found,) = objects(lines)
    assert list(found) == ["time", "level", "logger", "event", "outcome", "path"]
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "info",
        "logger": "service.test",
        "event": "answered",
        "outcome": "OK",
        "path": "/x",
    }


def test_a_text_line_is_logfmt(lines: Lines) -> None:
    logs.configure("text", "info")
    structlog.get_logger("service.test").info("it is answered", seconds=0.5, whole=True)
    (line,) = lines()
    time, rest = line.split(" ", 1)
    assert time.startswith("time=20")
    assert rest == 'level=info logger=service.test event="it is answered" seconds=0.5 whole=true'


def test_standard_library_lines_have_the_same_format(lines: Lines) -> None:
    logs.configure("json", "info")
    logging.getLogger("grpc._cython.cygrpc").warning("at %d of %s", 3, "5")
    (found,) = objects(lines)
    assert (found["logger"], found["level"]) == ("grpc._cython.cygrpc", "warning")
    assert found["event"] == "at 3 of 5"


def test_a_library_with_its_own_handler_is_logged_once(lines: Lines) -> None:
    logs.configure("json", "info")
    logging.getLogger("transformers.modeling_utils").warning("weights are tied")
    assert [one["event"] for one in objects(lines)] == ["weights are tied"]


def test_python_warnings_are_log_lines(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.configure("json", "info")
        warnings.warn("old\nname", DeprecationWarning, stacklevel=1)
    (found,) = objects(lines)
    assert found["logger"] == "py.warnings"
    assert "old\nname" in found["event"]


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_value_never_breaks_a_line(lines: Lines, format: logs.Format) -> None:
    logs.configure(format, "info")
    structlog.get_logger("service.test").info(HOSTILE, value=HOSTILE, many=[HOSTILE])
    logging.getLogger("grpc").info("%s", HOSTILE)
    written = lines()
    assert len(written) == 2
    assert all(line.isprintable() for line in written)
    assert not any(line.startswith("level=error") for line in written)


def test_letters_of_other_languages_stay_readable_in_text(lines: Lines) -> None:
    logs.configure("text", "info")
    structlog.get_logger("service.test").info("geöffnet", name="テーブル")
    assert lines()[0].endswith("event=geöffnet name=テーブル")


def fail() -> None:
    raise ValueError(f"bad {HOSTILE}")


def log_both_ways(message: str) -> None:
    try:
        fail()
    except ValueError:
        structlog.get_logger("service.test").exception(message)
        logging.getLogger("asyncio").exception(message)


def test_a_traceback_is_one_json_field(lines: Lines) -> None:
    logs.configure("json", "info")
    log_both_ways("failed")
    found = objects(lines)
    assert [one["event"] for one in found] == ["failed", "failed"]
    for one in found:
        assert one["exception"].startswith("Traceback (most recent call last):\n")
        assert "in fail\n" in one["exception"]
        assert "exc_info" not in one


def test_a_text_traceback_has_a_bar_before_each_line(lines: Lines) -> None:
    logs.configure("text", "info")
    log_both_ways("failed")
    written = lines()
    heads = [line for line in written if not line.startswith("  | ")]
    assert len(heads) == 2
    assert all("event=failed" in line for line in heads)
    assert sum("Traceback" in line for line in written) == 2
    assert all(line.isprintable() for line in written)


async def test_a_request_id_is_only_on_the_lines_of_its_call(lines: Lines) -> None:
    logs.configure("json", "info")
    log = structlog.get_logger("service.test")

    async def call(name: str) -> None:
        with bound_contextvars(request_id=name):
            await asyncio.sleep(0)
            log.info("ours")
            await asyncio.to_thread(logging.getLogger("torch").warning, "theirs")

    await asyncio.gather(call("one"), call("two"))
    log.info("outside")
    found = objects(lines)
    assert sorted((one["event"], one["request_id"]) for one in found[:-1]) == [
        (event, name) for event in ("ours", "theirs") for name in ("one", "two")
    ]
    assert "request_id" not in found[-1]


def test_the_level_applies_to_both_kinds_of_loggers(lines: Lines) -> None:
    logs.configure("text", "warning")
    structlog.get_logger("service.test").info("quiet")
    logging.getLogger("grpc").info("quiet")
    structlog.get_logger("service.test").warning("loud %s", "enough")
    (line,) = lines()
    assert line.endswith('event="loud enough"')


def test_configuring_again_replaces_the_output(lines: Lines) -> None:
    logs.configure("text", "info")
    log = structlog.get_logger("service.test")
    log.info("first")
    logs.configure("json", "info")
    log.info("second")
    first, second = lines()
    assert first.endswith("event=first")
    assert json.loads(second)["event"] == "second"
