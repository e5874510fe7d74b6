"""Prints errors of the command line: as one line, or as a JSON object.

Owns the form of an error on stderr. Knows nothing of exit codes or of calls.
"""

import json
import sys
from typing import Any

import typer

from a2sf.errors import A2SFError, InvalidArgument
from service.status import NoRoom, code_of


def report_line(error: A2SFError) -> None:
    """Print an error as one line that lists all its problems."""
    # Print the partial completion before the error.
    sys.stdout.flush()
    # Report all problems, so that the user need not fix them one by one.
    problems = "; ".join(f"{f}: {d}" for f, d in _violations(error)) or str(error)
    typer.echo(f"error: {' '.join(problems.split())}", err=True)


def report_json(error: A2SFError) -> None:
    """Print an error as a JSON object: `code`, `message`, and any known details."""
    shown: dict[str, Any] = {"code": code_of(error).name, "message": str(error)}
    if error.request_id:
        shown["request_id"] = error.request_id
    if violations := _violations(error):
        shown["field_violations"] = [{"field": f, "description": d} for f, d in violations]
    elif isinstance(error, NoRoom) and error.retry_after_s is not None:
        shown["retry_after_seconds"] = error.retry_after_s
    sys.stdout.flush()
    typer.echo(json.dumps({"error": shown}), err=True)


def _violations(error: A2SFError) -> tuple[tuple[str, str], ...]:
    """Return the invalid fields with their problems; empty if the error is not about fields."""
    return error.violations if isinstance(error, InvalidArgument) else ()
