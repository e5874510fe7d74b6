"""Runs `plan` as a user does, and returns its output."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import pytest

from service.__main__ import main


def shown(*arguments: object) -> str:
    """What the command prints; it must succeed."""
    with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, arguments)])
    assert ended.value.code == 0
    return out.getvalue()


def planned(*arguments: object) -> dict[str, Any]:
    """The same as programs read it."""
    plan: dict[str, Any] = json.loads(shown("--json", *arguments))
    return plan


def refused(*arguments: object) -> str:
    """Why the command does not plan, which it must say in one line."""
    with (
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as ended,
    ):
        main(["plan", *map(str, arguments)])
    assert (ended.value.code, out.getvalue()) == (2, "")
    line = err.getvalue()
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line
