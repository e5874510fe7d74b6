"""docs/errors.md is complete: every status that the service sends, and every error class."""

import re
from pathlib import Path

import grpc

from a2sf import errors
from service.status import CODES

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines()
    if line.startswith("| `")
]
TOLD = {code for codes, *_ in ROWS for code in re.findall(r"`([A-Z_]+)`", codes)}


def test_the_errors_page_lists_every_status() -> None:
    # Each is a row of the one table, or is named where it is sent or counted.
    sent = {code.name for code in CODES.values()}
    for path in (ROOT / "service").rglob("*.py"):
        # Traces know statuses that only others send.
        if "pb" not in path.parts and path.name != "tracing.py":
            text = path.read_text()
            sent |= set(re.findall(r"StatusCode\.([A-Z_]+)", text))
            sent |= set(re.findall(r"outcome: str = \"([A-Z_]+)\"", text))
            sent |= {name for name in grpc.StatusCode.__members__ if f'"{name}"' in text}
    # That is no failure.
    sent -= {"OK"}
    assert sent >= {"INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED", "UNAUTHENTICATED"}
    assert sent <= TOLD


def test_the_errors_page_lists_only_statuses() -> None:
    assert set(grpc.StatusCode.__members__) >= TOLD
    assert all(len(row) == 5 for row in ROWS)
    assert all(row[1] and row[4] for row in ROWS)


def test_the_errors_page_lists_every_error_class_with_its_status() -> None:
    for cls, code in CODES.items():
        if cls is errors.NonFinite:
            # A request never ends with it: the client gets INTERNAL, and the log has the cause.
            continue
        rows = [row for row in ROWS if f"`{code.name}`" in row[0]]
        kind = cls.__base__ is errors.TableError
        assert any(f"`{cls.__name__}`" in row[2 if kind else 3] for row in rows), cls
